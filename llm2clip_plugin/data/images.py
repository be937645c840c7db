"""What a tower expects of an image, and how an image is prepared for evaluation and training.

Shapes: S side of the tower's image in pixels, B batch. Pixels are RGB.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llm2clip_plugin.data.samples import AugmentConfig
from llm2clip_plugin.options import unknown
from llm2clip_plugin.pictures import load, open_header

# pixels of a crop (256 x 256) above which rounding its box to whole pixels is negligible
LARGE = 1 << 16
# PIL's own numbers
RESAMPLE = {
    "nearest": 0,
    "lanczos": 1,
    "bilinear": 2,
    "bicubic": 3,
    "box": 4,
    "hamming": 5,
}
FITS = ("shortest", "squash", "native")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a tower expects of an image, as in its preprocessor_config.json."""

    size: int = 224  # pixels, side of the tower's square image
    resize: int = 0  # pixels, shortest edge before the center crop; 0: size
    # shortest: keep the aspect ratio and crop the center; squash: stretch to the square; native:
    # keep the aspect ratio, in at most as many patches as the square has
    fit: str = "shortest"
    patch: int = 0  # pixels, side of a patch; if native
    resample: str = "bicubic"  # nearest | lanczos | bilinear | bicubic | box | hamming
    # RGB, for values in 0 .. 1; CLIP's
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    # RGB, for values in 0 .. 1; CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize and self.resize < self.size):
            raise ValueError(
                f"image size {self.size}, resize {self.resize}: expected 1 <= size <= resize (or 0)"
            )
        if self.fit not in FITS:
            raise ValueError(unknown("fit", self.fit, FITS))
        if self.resample not in RESAMPLE:
            raise ValueError(unknown("resample", self.resample, RESAMPLE))

    @property
    def shortest_edge(self) -> int:
        """Pixels of the shorter side before the center crop."""
        return self.resize or self.size

    @property
    def patches(self) -> int:
        """The most patches of an image; if native."""
        return (self.size // self.patch) ** 2

    @classmethod
    def from_preprocessor(cls, values: dict[str, Any]) -> ImageConfig:
        """From a Hugging Face image processor's dictionary (CLIP, SigLIP, DINOv2's
        BitImageProcessor, NaFlex's ...).

        Raises ValueError for settings that this class does not support.
        """
        most = int(values.get("max_num_patches") or 0)
        patch = int(values.get("patch_size", 16))
        native = most > 0
        if native:
            side = math.isqrt(most) * patch
            square = {"height": side, "width": side}
            values = {**values, "size": square, "do_center_crop": False}
        crop = bool(values.get("do_center_crop", values.get("crop_size") is not None))
        edge, height, width = _sides(values.get("size"), "size")
        crop_height = height
        crop_width = height
        if crop:
            _, crop_height, crop_width = _sides(values.get("crop_size"), "crop_size")
        names = {number: name for name, number in RESAMPLE.items()}
        resample = names.get(int(values.get("resample", 3)), "")
        rescale = values.get("rescale_factor", 1 / 255)
        problem = ""
        if values.get("do_resize", True) is False or values.get("do_pad"):
            problem = "do_resize false or do_pad true, so its images have no fixed size"
        elif not math.isclose(float(rescale), 1 / 255, rel_tol=1e-6):
            problem = f"rescale_factor {values['rescale_factor']}; expected 1/255"
        elif native and most * patch**2 != height**2:
            problem = f"max_num_patches {most}; expected a square such as {math.isqrt(most) ** 2}"
        elif height != width or crop_height != crop_width:
            problem = (
                f"size {height} x {width} and crop_size {crop_height} x {crop_width}; "
                "expected a square"
            )
        elif edge and not crop:
            problem = f"shortest_edge {edge}, which keeps the aspect ratio, but no center crop"
        elif not edge and height != crop_height:
            problem = (
                f"size {height} and crop_size {crop_height}, so it stretches and crops"
            )
        elif not resample:
            problem = f"resample {values['resample']!r}; known: {RESAMPLE}"
        if problem:
            raise ValueError(f"preprocessor has {problem}; not supported")
        fit = "shortest" if edge else "squash"
        if native:
            fit = "native"
        mean = (0.0, 0.0, 0.0)
        std = (1.0, 1.0, 1.0)
        if values.get("do_normalize", True):
            mean = _triple(values.get("image_mean", cls.mean))
            std = _triple(values.get("image_std", cls.std))
        return cls(
            size=crop_height,
            resize=0 if edge == crop_height else edge,
            fit=fit,
            patch=patch if native else 0,
            resample=resample,
            mean=mean,
            std=std,
        )


def _sides(value: Any, name: str) -> tuple[int, int, int]:
    """(shortest edge or 0, height, width) from a preprocessor's size, a number or a mapping."""
    if isinstance(value, int):
        return (value, value, value)
    if isinstance(value, dict) and "shortest_edge" in value:
        return (value["shortest_edge"],) * 3
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        return (0, value["height"], value["width"])
    raise ValueError(
        f"preprocessor has {name} {value!r}; expected a number, shortest_edge, or height and width"
    )


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


class Normalize:
    """uint8 pixels -> (value / 255 - mean) / std, on a device: images travel there as bytes."""

    def __init__(self, config: ImageConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        mean_1311 = torch.tensor(config.mean, device=device).view(1, 3, 1, 1)
        std_1311 = torch.tensor(config.std, device=device).view(1, 3, 1, 1)
        self.shift = mean_1311 * 255
        self.scale = 1 / (255 * std_1311)

    def shapes(self, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """A batch's spatial_shapes (B, 2) on the device, if its images keep their aspect."""
        if "spatial_shapes" not in batch:
            return []
        return [batch["spatial_shapes"].to(self.device, non_blocking=True)]

    def __call__(self, pixels_BSS3: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8, wherever it lies -> (B, 3, S, S) float32 on the device."""
        values = pixels_BSS3.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        values = values.to(torch.float32, memory_format=torch.contiguous_format)
        return values.sub_(self.shift).mul_(self.scale)


def native_size(
    width: float, height: float, patch: int, patches: int
) -> tuple[int, int]:
    """Width and height in pixels, multiples of ``patch``, of an image in at most ``patches``
    patches.

    Both sides are rounded up, at the largest scale that fits: transformers' search for it, step by
    step.
    """

    def scaled(scale: float) -> tuple[int, int]:
        columns = max(1, math.ceil(width * scale / patch))
        rows = max(1, math.ceil(height * scale / patch))
        return columns * patch, rows * patch

    low = 1e-6
    high = 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        if math.prod(scaled(middle)) <= patches * patch**2:
            low = middle
        else:
            high = middle
    return scaled(low)


def as_square(
    pixels_HW3: np.ndarray, config: ImageConfig
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """(S, S, 3) with the patches of a native image row by row, then zeros; the image's rows and
    columns of patches. Other images as they are, and None."""
    if config.fit != "native":
        return pixels_HW3, None
    side = config.size
    patch = config.patch
    grid = side // patch
    rows = len(pixels_HW3) // patch
    columns = pixels_HW3.shape[1] // patch
    square = np.zeros((grid * grid, patch, patch, 3), pixels_HW3.dtype)
    patches = pixels_HW3.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    square[: rows * columns] = patches.reshape(-1, patch, patch, 3)
    by_row = square.reshape(grid, grid, patch, patch, 3).swapaxes(1, 2)
    return by_row.reshape(side, side, 3), (rows, columns)


def evaluation_pixels(data: bytes, config: ImageConfig) -> np.ndarray:
    """(S, S, 3) uint8, (H, W, 3) if native: resized and cropped as by the tower's Hugging Face
    processor. Raises BrokenImage."""
    # EXIF orientation is ignored, as in the towers' own preprocessors
    image = load(open_header(data))
    side = config.size
    resample = RESAMPLE[config.resample]
    if config.fit == "native":
        size = native_size(*image.size, config.patch, config.patches)
        return np.array(image.resize(size, resample))
    if config.fit == "squash":
        return np.array(image.resize((side, side), resample))
    edge = config.shortest_edge
    short = min(image.size)
    long = max(image.size)
    stretched = int(edge * long / short)  # Hugging Face rounds down
    width = edge
    height = stretched
    if image.width > image.height:
        width = stretched
        height = edge
    left = (width - side) // 2
    top = (height - side) // 2
    resized = image.resize((width, height), resample)
    return np.array(resized.crop((left, top, left + side, top + side)))


def training_pixels(
    data: bytes, config: ImageConfig, augment: AugmentConfig, rng: random.Random
) -> np.ndarray:
    """(S, S, 3) uint8: a random crop, resized, mirrored and rotated as configured. Equal rngs give
    equal pixels.

    If native, (H, W, 3), and the crop's ratio is relative to the image's. Raises BrokenImage.
    """
    image = open_header(data)
    full = image.size
    if config.fit == "native":
        left, top, width, height = random_crop((1, 1), augment, rng)
        left = left * full[0]
        top = top * full[1]
        width = width * full[0]
        height = height * full[1]
        size = native_size(width, height, config.patch, config.patches)
    else:
        left, top, width, height = random_crop(full, augment, rng)
        size = (config.size, config.size)
    mirrored = augment.flip and rng.random() < 0.5
    angle = rng.uniform(-augment.rotate, augment.rotate) if augment.rotate else 0.0
    needed = min(size) * augment.decode_margin  # pixels of the crop's shorter side
    image, factor = _load_reduced(image, min(width, height), needed)
    right = min((left + width) / factor, image.width)
    bottom = min((top + height) / factor, image.height)
    box = (left / factor, top / factor, right, bottom)
    pixels_HW3 = resize_box(image, box, size, config.resample)
    if mirrored:
        pixels_HW3 = np.ascontiguousarray(pixels_HW3[:, ::-1])
    if angle:
        pixels_HW3 = _rotated(pixels_HW3, angle)
    return pixels_HW3


def _load_reduced(
    image: Image.Image, side: float, needed: float
) -> tuple[Image.Image, int]:
    """A JPEG at 1, 1/2, 1/4 or 1/8 of its size, the smallest at which ``side`` pixels are still
    ``needed`` ones; another image at full size. And by how much it is smaller."""
    full = image.size
    factor = 1
    for candidate in (2, 4, 8):
        if side >= candidate * needed:
            factor = candidate
    image = load(image, factor)
    if image.size == full:
        factor = 1  # not a JPEG
    return image, factor


def _rotated(pixels_HW3: np.ndarray, angle: float) -> np.ndarray:
    """Rotated by ``angle`` degrees; what that leaves empty has the mean color of the corners."""
    corners_43 = pixels_HW3[[0, 0, -1, -1], [0, -1, 0, -1]]
    color = tuple(int(value) for value in corners_43.mean(axis=0).round())
    image = Image.fromarray(pixels_HW3)
    bilinear = Image.Resampling.BILINEAR
    return np.array(image.rotate(angle, bilinear, fillcolor=color))


def resize_box(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    resample: str,
) -> np.ndarray:
    """(H, W, 3) uint8: the part of an RGB image within ``box`` (left, top, right, bottom), resized
    to ``size`` (W, H).

    A large box is rounded to whole pixels and resized by torch, which is more than twice as fast as
    PIL and differs from it by at most 2 of 255 levels.
    """
    left, top, right, bottom = box
    is_small = (right - left) * (bottom - top) < LARGE
    if is_small or resample not in ("bilinear", "bicubic") or not _fast_resize():
        number = RESAMPLE[resample]
        return np.array(image.resize(size, number, box=box, reducing_gap=3.0))
    pixels_hw3 = torch.from_numpy(np.array(image))
    crop_hw3 = pixels_hw3[round(top) : round(bottom), round(left) : round(right)]
    crop_13hw = crop_hw3.permute(2, 0, 1)[None]
    out_13HW = F.interpolate(crop_13hw, size[::-1], mode=resample, antialias=True)
    return np.ascontiguousarray(out_13HW[0].permute(1, 2, 0).numpy())


@lru_cache
def _fast_resize() -> bool:
    """Whether this torch resizes uint8 images with vector instructions: 2.1 or newer, on a CPU with
    AVX2."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    capability = torch.backends.cpu.get_cpu_capability()
    return version >= (2, 1) and capability in ("AVX2", "AVX512")


def random_crop(
    size: tuple[int, int], augment: AugmentConfig, rng: random.Random
) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a crop of an image of ``size`` (width, height), in pixels, not
    rounded.

    The area is uniform within ``scale``, the ratio log-uniform within ``ratio`` (Szegedy et al.
    2014, section 6). After ten crops that don't fit it is the largest center crop of an allowed
    ratio.
    """
    full_width, full_height = size
    narrowest, widest = augment.ratio
    for _ in range(10):
        area = rng.uniform(*augment.scale) * full_width * full_height
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        width = math.sqrt(area * ratio)
        height = math.sqrt(area / ratio)
        if width <= full_width and height <= full_height:
            left = rng.uniform(0, full_width - width)
            top = rng.uniform(0, full_height - height)
            return left, top, width, height
    ratio = min(max(full_width / full_height, narrowest), widest)
    width = min(full_width, full_height * ratio)
    height = min(full_height, full_width / ratio)
    return (full_width - width) / 2, (full_height - height) / 2, width, height
