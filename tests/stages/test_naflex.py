"""SigLIP 2 NaFlex and Qwen3-VL's tower: images in their own aspect, imported, trained, exported,
evaluated."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import encoded, make_cache, write_tar
from torch.utils._python_dispatch import TorchDispatchMode
from tower_runs import finish, losses, options, start

from llm2clip_plugin import load_tower
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.images import (
    ImageConfig,
    Normalize,
    as_square,
    evaluation_pixels,
)
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.evaluate.commands import open_tower
from llm2clip_plugin.evaluate.features import encode_images
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.convert.layouts.hub import parse_qwen
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config

transformers = pytest.importorskip("transformers", minversion="5.0")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ASPECTS = [(30, 20), (37, 60), (20, 20), (100, 9)]  # width, height in pixels
TOLERANCE = 1e-5


def image(seed: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def prepared(data: bytes, images: ImageConfig) -> dict[str, torch.Tensor]:
    square, shape = as_square(evaluation_pixels(data, images), images)
    return {
        "pixel_values": Normalize(images)(torch.from_numpy(square)[None]),
        "spatial_shapes": torch.tensor([shape]),
    }


def publish(folder: Path, *, whole: bool = False, patches: int = 36) -> Any:
    """Random weights in the Hub's layout, 4 x 4 positions, at most ``patches`` of 4 pixels; the
    vision model."""
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4)
    model: Any = transformers.Siglip2VisionModel(config)
    published = model
    if whole:
        text = {**SIZES, "vocab_size": 50, "projection_size": 32}
        published = transformers.Siglip2Model(
            transformers.Siglip2Config(text_config=text, vision_config=config)
        )
        model = published.vision_model
    published.save_pretrained(folder)
    settings = {
        "image_processor_type": "Siglip2ImageProcessor",
        "patch_size": 4,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings | {"max_num_patches": patches})
    )
    return model.eval()


def publish_qwen(folder: Path) -> Any:
    """As above, a whole Qwen3-VL with 6 x 6 positions; its vision model."""
    torch.manual_seed(0)
    vision = {
        **SIZES,
        "patch_size": 4,
        "num_position_embeddings": 36,
        "out_hidden_size": 32,
    }
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text)
    model: Any = transformers.Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.model.visual.eval()


@pytest.fixture(scope="module", params=[publish, publish_qwen])
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tower, and images of several aspects with their cache."""
    folder = tmp_path_factory.mktemp("naflex")
    request.param(folder / "published")
    import_tower(folder / "published", folder / "tower")
    members: list[tuple[str, bytes]] = []
    for number in range(24):
        members.append((f"{number:03d}.png", image(number, ASPECTS[number % 4])))
        members.append(
            (f"{number:03d}.json", json.dumps({"caption": f"number {number}"}).encode())
        )
    write_tar(folder / "data" / "00000.tar", members)
    make_cache(folder / "data")
    return folder


@pytest.mark.parametrize("whole", [False, True])
def test_features_are_transformers_own(tmp_path: Path, whole: bool):
    """With its own processor, which the tower's directory configures, and with images prepared
    here."""
    original = publish(tmp_path / "published", whole=whole)
    assert load_tower(tmp_path / "published").config.image_size == 16
    card, _ = import_tower(tmp_path / "published", tmp_path / "tower")
    assert card.family == "naflex"
    assert card.image_size == 24
    assert card.num_patches == 36
    for image_size in (24, 32):
        tower = load_tower(tmp_path / "tower", image_size=image_size)
        settings = preprocessor_config(tower)
        assert settings["max_num_patches"] == (image_size // 4) ** 2
        images = ImageConfig.from_preprocessor(settings)
        processor = transformers.Siglip2ImageProcessorPil(**settings)
        dual = DualEncoder(
            tower, DualConfig(projection="none", projection_dim=32, pool="mean")
        )
        for seed, size in enumerate(ASPECTS):
            data = image(seed, size)
            theirs = processor(Image.open(io.BytesIO(data)), return_tensors="pt")
            ours = prepared(data, images)
            with torch.no_grad():
                pairs = ((original, theirs), (tower, theirs), (tower, ours))
                expected, *outputs = (
                    model(**inputs, output_hidden_states=True)
                    for model, inputs in pairs
                )
            count = int(ours["spatial_shapes"].prod())
            states = [*expected.hidden_states, expected.last_hidden_state]
            for output in outputs:
                for state, wanted in zip(
                    [*output.hidden_states, output.last_hidden_state],
                    states,
                    strict=True,
                ):
                    torch.testing.assert_close(
                        state[:, :count], wanted[:, :count], atol=TOLERANCE, rtol=0
                    )
                torch.testing.assert_close(
                    output.pooler_output, expected.pooler_output, atol=TOLERANCE, rtol=0
                )
            for mean in (
                dual.pool(**ours),
                dual.pool(theirs["pixel_values"], theirs["spatial_shapes"]),
            ):
                torch.testing.assert_close(
                    mean, states[-1][:, :count].mean(1), atol=TOLERANCE, rtol=0
                )


def test_patches_that_are_no_square_need_a_size(tmp_path: Path):
    publish(tmp_path / "published", patches=40)
    with pytest.raises(ValueError, match="--image-size"):
        import_tower(tmp_path / "published", tmp_path / "tower")
    card, _ = import_tower(tmp_path / "published", tmp_path / "tower", image_size=24)
    assert card.image_size == 24
    assert card.num_patches == 36
    assert card.training.get("resized_from") is None


def test_states_are_qwens_own(tmp_path: Path):
    """Whose patches come in blocks of 2 x 2, (channels, 2 equal frames, rows, columns), without
    padding."""
    original = publish_qwen(tmp_path / "published")
    with pytest.raises(ValueError, match="llm2clip import"):
        load_tower(tmp_path / "published")
    with pytest.raises(ValueError, match="patch_embed"):  # of a damaged file
        parse_qwen({}, {})
    import_tower(tmp_path / "published", tmp_path / "tower")
    patches = torch.rand(4, 36, 4, 4, 3)
    shapes = torch.tensor([[4, 8], [6, 4], [6, 6], [2, 16]])
    inputs = {
        "pixel_values": patches.flatten(2),
        "spatial_shapes": shapes,
        "output_hidden_states": True,
    }
    output = load_tower(tmp_path / "tower")(**inputs)
    for n, (rows, columns) in enumerate(shapes.tolist()):
        order = (
            torch.arange(rows * columns)
            .view(rows // 2, 2, columns // 2, 2)
            .transpose(1, 2)
            .flatten()
        )
        theirs = (
            patches[n, order]
            .permute(0, 3, 1, 2)
            .unsqueeze(2)
            .repeat(1, 1, 2, 1, 1)
            .flatten(1)
        )
        expected = original(
            theirs, torch.tensor([[1, rows, columns]]), output_hidden_states=True
        )
        wanted = torch.stack(expected.hidden_states)
        torch.testing.assert_close(
            torch.stack(output.hidden_states)[:, n, order],
            wanted,
            atol=TOLERANCE,
            rtol=0,
        )
        torch.testing.assert_close(
            output.pooler_output[n], wanted[-1].mean(0), atol=TOLERANCE, rtol=0
        )


class HostReads(TorchDispatchMode):
    """Fails where the host would wait for the value of a GPU's tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_a_square_of_pixels_is_a_square_image(tiny: Path):
    tower = load_tower(tiny / "tower")
    pixels = torch.rand(2, 3, 24, 24)
    shapes = torch.tensor([[6, 6]] * 2)
    with HostReads():
        of_pixels = tower(pixel_values=pixels)
        other = tower(pixel_values=pixels, spatial_shapes=shapes)
    torch.testing.assert_close(
        of_pixels.to_tuple(), other.to_tuple(), atol=TOLERANCE, rtol=0
    )
    with pytest.raises(ValueError, match="images have"):
        tower(pixel_values=pixels[..., 4:, 4:])
    with pytest.raises(ValueError, match="spatial_shapes"):
        tower(pixel_values=torch.rand(2, 36, 48))


def test_training_over_ranks_and_micro_batches_is_one_run(tiny: Path, tmp_path: Path):
    """Two ranks with micro-batches have the losses of one without; patch terms, heads, evaluation,
    export work."""
    more = [
        "--tower.image-size",
        "32",
        "--max_steps",
        "3",
        "--train.eval-steps",
        "3",
        "--dual.pool",
        "mean",
    ]
    more += [
        "--loss.terms",
        "infonce=1",
        "patch_captions=0.5",
        "patch_reference=1",
        "--validation",
        str(tiny / "data"),
    ]
    for name, world, micro in (("one", 1, "16"), ("two", 2, "4")):
        assert (
            finish(
                start(
                    options(tiny, tmp_path / name, *more, "--train.micro-batch", micro),
                    world,
                )
            )
            == [0] * world
        )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    exported = tmp_path / "one" / "tower"
    card = TowerCard.read(exported / TowerCard.FILE)
    assert card.num_patches == 64
    assert card.training["resized_from"] == 24
    assert (
        llm2clip(
            [
                "evaluate",
                str(exported),
                str(tiny / "data"),
                "--json",
                str(tmp_path / "scores.json"),
            ]
        )
        == 0
    )
    tower = open_tower(f"{exported}", "cpu", EncoderConfig())
    source = open_source(SourceConfig(path=f"{tiny}/data"))
    encoded = encode_images(tower.dual.encode_image, source, tower.images, tower.device)
    vectors = tower.dual.encode_image(**prepared(image(5, ASPECTS[1]), tower.images))
    torch.testing.assert_close(encoded.vectors[0][5], vectors[0].detach())
