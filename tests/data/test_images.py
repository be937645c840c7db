import base64
import io
import math
import random

import numpy as np
import pytest
import torch
from data_world import encoded, jpeg, picture
from PIL import Image

from llm2clip_plugin.data.images import (
    ImageConfig,
    Normalize,
    as_square,
    evaluation_pixels,
    native_size,
    random_crop,
    resize_box,
    training_pixels,
)
from llm2clip_plugin.data.samples import AugmentConfig
from llm2clip_plugin.pages import thumbnail
from llm2clip_plugin.pictures import BrokenImage, load, open_header


def hf_processors() -> dict[str, type]:
    """The PIL processors of the installed transformers: 5.x has them beside the torchvision
    ones."""
    try:
        from transformers.models.bit.image_processing_pil_bit import (
            BitImageProcessorPil,
        )
        from transformers.models.clip.image_processing_pil_clip import (
            CLIPImageProcessorPil,
        )
        from transformers.models.siglip.image_processing_pil_siglip import (
            SiglipImageProcessorPil,
        )
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            Siglip2ImageProcessorPil,
        )
    except ImportError:
        from transformers import (
            BitImageProcessor,
            CLIPImageProcessor,
            SiglipImageProcessor,
        )

        return {
            "clip": CLIPImageProcessor,
            "siglip": SiglipImageProcessor,
            "bit": BitImageProcessor,
        }
    processors = {
        "clip": CLIPImageProcessorPil,
        "siglip": SiglipImageProcessorPil,
        "bit": BitImageProcessorPil,
    }
    return {**processors, "siglip2": Siglip2ImageProcessorPil}


DINO = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
DINO |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "clip 224": ("clip", {}),
    "siglip 384": ("siglip", {"size": {"height": 384, "width": 384}}),
}
PROCESSORS |= {
    "dinov2 256 -> 224": ("bit", DINO),
    "bilinear": ("clip", {"resample": 2}),
}


def normalized(data: bytes, config: ImageConfig) -> np.ndarray:
    return Normalize(config)(torch.from_numpy(evaluation_pixels(data, config))[None])[
        0
    ].numpy()


@pytest.mark.parametrize("name, settings", PROCESSORS.values(), ids=PROCESSORS)
def test_evaluation_equals_the_towers_own_preprocessor(
    name: str, settings: dict
) -> None:
    """Tolerance 1e-6: the pixels are the same bytes, only the order of the float32 arithmetic
    differs."""
    processor = hf_processors()[name](**settings)
    config = ImageConfig.from_preprocessor(processor.to_dict())
    for seed, size in enumerate(
        [(300, 200), (200, 301), (640, 481), (37, 1000), (224, 224), (20, 20)]
    ):
        for data in (
            jpeg(seed, size),
            encoded(picture(seed, size).convert("L"), "PNG"),
        ):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            expected = processor(images=image, return_tensors="np")["pixel_values"][0]
            assert np.abs(normalized(data, config) - expected).max() < 1e-6


@pytest.mark.parametrize("patch, patches", [(16, 256), (14, 49)])
def test_native_images_equal_naflexs_own_preprocessor(patch: int, patches: int) -> None:
    """The patches in the square, row by row, those of transformers; what is left of it is empty."""
    processor = hf_processors().get("siglip2") or pytest.skip("transformers 4 has none")
    config = ImageConfig.from_preprocessor(
        processor(patch_size=patch, max_num_patches=patches).to_dict()
    )
    assert config.fit == "native"
    assert config.size == math.isqrt(patches) * patch
    for seed, size in enumerate(
        [(300, 200), (200, 301), (640, 481), (37, 1000), (600, 4), (224, 224), (20, 20)]
    ):
        data = jpeg(seed, size)
        image = Image.open(io.BytesIO(data))
        expected = processor(patch_size=patch, max_num_patches=patches)(
            image, return_tensors="np"
        )
        pixels, shape = as_square(evaluation_pixels(data, config), config)
        assert shape == tuple(expected["spatial_shapes"][0])
        count = math.prod(shape)
        grid = config.size // patch
        values = (
            Normalize(config)(torch.from_numpy(pixels)[None])[0]
            .numpy()
            .reshape(3, grid, patch, grid, patch)
        )
        patches_ours = values.transpose(1, 3, 2, 4, 0).reshape(grid * grid, -1)
        assert (
            np.abs(patches_ours[:count] - expected["pixel_values"][0][:count]).max()
            < 1e-6
        )
        assert np.abs(patches_ours[count:] + 1).max(initial=0) < 1e-6


def test_native_crops_keep_the_aspect() -> None:
    """The crop's ratio is relative to the image's own; the part of the image that it says is cut
    out."""
    config = ImageConfig(size=64, patch=8, fit="native", resample="bilinear")
    image = picture(0, (900, 310))
    for seed in range(5):
        augment = AugmentConfig(scale=(0.3, 1.0), ratio=(1.0, 1.0))
        left, top, width, height = random_crop((1, 1), augment, random.Random(seed))
        box = (900 * left, 310 * top, 900 * (left + width), 310 * (top + height))
        size = native_size(900, 310, 8, 64)
        pixels = training_pixels(
            encoded(image, "PNG"), config, augment, random.Random(seed)
        )
        assert (pixels.shape[1], pixels.shape[0]) == size == (96, 40)
        expected = np.asarray(
            image.resize(size, Image.Resampling.BILINEAR, box=box)
        ).astype(int)
        # the box is rounded to whole pixels
        assert np.abs(pixels - expected).mean() < 4


def test_palettes_and_transparency_are_read_as_llava_does() -> None:
    """LLaVA hands its processor ``image.convert("RGB")``; transformers 5 by itself would put white
    behind."""
    processor = hf_processors()["clip"]()
    config = ImageConfig.from_preprocessor(processor.to_dict())
    rgba = picture(0).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    others = [(picture(1).quantize(16), "PNG"), (picture(2).convert("CMYK"), "JPEG")]
    for image, kind in [(rgba, "PNG"), (rgba, "WEBP"), *others]:
        data = encoded(image, kind)
        expected = processor(
            images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="np"
        )
        assert (
            np.abs(normalized(data, config) - expected["pixel_values"][0]).max() < 1e-6
        )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_images_of_16_bits_are_read_as_they_are_shown(kind: str) -> None:
    """PIL makes every value above 255 white, which is nearly all of them."""
    levels_HW = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2500
    data = encoded(Image.fromarray(levels_HW), kind)
    pixels_HW3 = np.array(load(open_header(data)))
    assert pixels_HW3.shape == (4, 6, 3)
    assert (pixels_HW3 == (levels_HW // 256)[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pages_show_gray_images_of_16_bits_as_they_are_read(kind: str) -> None:
    levels_HW = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    uri = thumbnail(encoded(Image.fromarray(levels_HW), kind)) or ""
    data = base64.b64decode(uri.partition(",")[2])
    shown_HW = np.array(Image.open(io.BytesIO(data)).convert("L"), dtype=int)
    assert np.abs(shown_HW - (levels_HW // 256)).max() < 8  # of JPEG


def test_images_of_32_bits_are_refused() -> None:
    """Nobody knows which value is white."""
    data = encoded(Image.fromarray(np.full((4, 6), 0.5, np.float32)), "TIFF")
    with pytest.raises(BrokenImage, match=r"^the image has 32 bits a pixel"):
        load(open_header(data))


def test_preprocessors_that_are_not_understood_are_refused() -> None:
    for says, values in {
        "no center crop": {"size": {"shortest_edge": 224}, "do_center_crop": False},
        "expected a square": {"size": {"height": 224, "width": 200}},
        "max_num_patches": {"patch_size": 16, "max_num_patches": 200},
        "longest_edge": {"size": {"longest_edge": 224}},
        "rescale_factor": {"size": 224, "rescale_factor": 1 / 127.5},
        "do_resize": {"size": 224, "crop_size": 224, "do_resize": False},
    }.items():
        with pytest.raises(ValueError, match=says):
            ImageConfig.from_preprocessor(values)


def test_the_crop_is_cut_where_it_says() -> None:
    """Four coloured quarters: a crop decoded at 1/2 shows the same borders as one decoded in
    full."""
    pixels = np.zeros((600, 800, 3), np.uint8)
    pixels[:300, :400, 0] = pixels[300:, 400:, 1] = pixels[300:, :400, 2] = 255
    image = Image.fromarray(pixels)
    config = ImageConfig(size=100)
    augment = AugmentConfig(scale=(0.3, 0.9))
    for seed in range(20):
        small = training_pixels(
            encoded(image, quality=95, subsampling=0),
            config,
            augment,
            random.Random(seed),
        )
        full = training_pixels(
            encoded(image, "PNG"), config, augment, random.Random(seed)
        )
        assert np.abs(small.astype(int) - full).mean() < 2.5
        left, top, width, height = random_crop((800, 600), augment, random.Random(seed))
        column = round((400 - left) / width * 100)
        row = round((300 - top) / height * 100)
        if 10 < column < 90 and 10 < row < 90:
            assert full[row - 5, column - 5, 0] > 200
            assert full[row - 5, column + 5].max() < 50
            assert full[row + 5, column - 5, 2] > 200
            assert full[row + 5, column + 5, 1] > 200


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("side", [98, 224, 448])
def test_large_crops_are_resized_as_pil_does(side: int, resample: str) -> None:
    """At most two levels from PIL on the same whole pixels; rounding the box moves noisy pixels by
    a few."""
    image = picture(3, (640, 480))
    box = (10.3, 20.6, 600.2, 455.9)
    kernel = getattr(Image.Resampling, resample.upper())
    whole = np.asarray(
        image.crop((10, 21, 600, 456)).resize((side, side), kernel), dtype=int
    )
    exact = np.asarray(
        image.resize((side, side), kernel, box=box, reducing_gap=3.0), dtype=int
    )
    resized = resize_box(image, box, (side, side), resample)
    assert resized.dtype == np.uint8
    assert resized.shape == (side, side, 3)
    assert min(np.abs(resized - whole).max(), np.abs(resized - exact).max()) <= 2
    assert np.abs(resized - exact).mean() < 2
    small = (10.3, 20.6, 200.2, 155.9)  # not rounded
    assert np.array_equal(
        resize_box(image, small, (side, side), resample),
        np.asarray(image.resize((side, side), kernel, box=small)),
    )


def test_flip_is_every_second_and_off_by_default() -> None:
    data = encoded(picture(5, (32, 32)), "PNG")
    plain = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    whole = training_pixels(data, ImageConfig(size=32), plain, random.Random(0))
    assert np.array_equal(whole, np.asarray(picture(5, (32, 32))))
    flipping = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    flips = 0
    for seed in range(200):
        pixels = training_pixels(
            data, ImageConfig(size=32), flipping, random.Random(seed)
        )
        mirrored = np.array_equal(pixels, whole[:, ::-1])
        assert mirrored or np.array_equal(pixels, whole)
        flips += mirrored
    assert 70 < flips < 130


def test_crops_have_the_area_and_the_ratio_of_inception() -> None:
    """The area is uniform, the ratio log-uniform: a crop is as often tall as wide."""
    rng = random.Random(0)
    # every first try fits
    augment = AugmentConfig(scale=(0.01, 0.05), ratio=(0.25, 4.0))
    crops = [random_crop((1000, 1000), augment, rng)[2:] for _ in range(2000)]
    assert 0.45 < np.mean([width < height for width, height in crops]) < 0.55
    assert 0.20 < np.mean([width < height / 2 for width, height in crops]) < 0.30
    assert 0.45 < np.mean([width * height < 30_000 for width, height in crops]) < 0.55


def test_images_are_rotated_to_both_sides() -> None:
    """A white line: where it goes up at its right end, the picture was rotated to the left."""
    pixels = np.zeros((33, 33, 3), np.uint8)
    pixels[16] = 255
    data = encoded(Image.fromarray(pixels), "PNG")
    augment = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), rotate=30.0)
    to_the_left = 0
    for seed in range(200):
        rotated = training_pixels(
            data, ImageConfig(size=33), augment, random.Random(seed)
        )
        column_S = rotated[:, 28, 0].astype(int)
        to_the_left += column_S[:16].sum() > column_S[17:].sum()
    assert 70 < to_the_left < 130


def broken_images() -> dict[str, bytes]:
    whole = jpeg(0, (200, 200))
    png = encoded(picture(0), "PNG")
    return {
        "empty": b"",
        "text": b"<html>not found</html>",
        "jpeg cut": whole[: len(whole) // 2],
        "png damaged": png[:60] + bytes(40) + png[100:],
        "webp cut": encoded(picture(0), "WEBP")[:200],
        "bomb": b"\x89PNG\r\n\x1a\n"
        + bytes.fromhex("0000000d49484452000fffff000fffff0802000000")
        + bytes(64),
    }


@pytest.mark.parametrize("data", broken_images().values(), ids=broken_images())
def test_broken_images_raise_broken_image(data: bytes) -> None:
    with pytest.raises(BrokenImage):
        evaluation_pixels(data, ImageConfig(size=32))
    with pytest.raises(BrokenImage):
        training_pixels(data, ImageConfig(size=32), AugmentConfig(), random.Random(0))


def test_bytes_normalized_where_they_are_used_have_the_values_of_the_definition() -> (
    None
):
    """fp32 rounds numbers up to 2.7 by less than 3e-7 in each of three operations."""
    config = ImageConfig(size=16)
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    normalized = Normalize(config)(torch.from_numpy(pixels))
    expected = (pixels.astype(np.float64) / 255 - config.mean) / config.std
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous()
    assert normalized.shape == (1, 3, 16, 16)
    assert np.abs(normalized.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-6
