"""A tiny dual encoder of any tower and LLM, exported for sentence-transformers, and pictures."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.stages.embedder import open_folder, png, prepared
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.towers import load_tower, timm_tower

GOLDEN = Path(__file__).parents[1] / "golden"
TRANSFORMERS = GOLDEN / "reference" / "G_transformers_towers"
TODAY = GOLDEN / "towers_of_today"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CAPTIONS = [
    "a red bicycle leans against a brick wall",
    "two dogs run over the wet grass",
    "x",
    "zwei Hunde </s> 猫が眠っている",
    "the cat sleeps in a box " * 12,
]


def tower_of(family: str, folder: Path) -> Any:
    """A random tiny tower of a family."""
    torch.manual_seed(0)
    if (TODAY / family).is_dir():
        import_tower(TODAY / family, folder / "imported")
        return load_tower(folder / "imported")
    if (TRANSFORMERS / family).is_dir():
        return load_tower(TRANSFORMERS / family)
    if family == "timm":
        arguments = {"depth": 2, "embed_dim": 64, "num_heads": 4}
        return timm_tower("vit_tiny_patch16_224", pretrained=False, arguments=arguments)
    if family == "naflex":
        tower_class = families()["naflex"].vision_class()
        sizes = {**SIZES, "intermediate_size": 64, "patch_size": 4, "num_patches": 36}
        return tower_class(tower_class.config_class(**sizes)).eval()
    assert family == "eva02"
    sizes = {**SIZES, "intermediate_size": 85, "image_size": 28, "patch_size": 7}
    return Eva02VisionModel(Eva02Config(**sizes, rope_pretrained_grid=4)).eval()


def write_dual(
    folder: Path,
    llm: Path,
    *,
    family: str = "clip_vision",
    encoder: Any = None,
    **dual: Any,
) -> Path:
    """A tower directory whose teacher is ``encoder``, by default the LLM as it is."""
    if encoder is None:
        config = EncoderConfig(llm=str(llm), compute_dtype="float32")
        encoder = CaptionEncoder(config, "cpu")
    settings = {"projection_dim": 8, "adapter_blocks": 1, **dual}
    tower = tower_of(family, folder)
    model = DualEncoder(tower, DualConfig(llm_width=encoder.width, **settings)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that norms and biases matter
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    teacher = dataclasses.asdict(encoder.identity())
    export_tower(model, folder / "tower", origin="tiny", teacher=teacher)
    return folder / "tower"


def pictures(count: int = 3) -> list[Image.Image]:
    """Pictures of several aspects."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        size = (20 + 17 * (number % 4), 64 - 9 * (number % 3))
        made.append(coarse.resize(size, Image.Resampling.BICUBIC))
    return made


def expected_of(
    tower: Path,
    images: list[Image.Image],
    captions: list[str],
    *,
    teacher: EncoderConfig | None = None,
) -> torch.Tensor:
    """The embeddings of ``load_dual_encoder``: of pictures as in evaluation, then of captions."""
    teacher = teacher or EncoderConfig(compute_dtype="float32")
    dual = load_dual_encoder(tower, teacher=teacher)
    with torch.no_grad():
        image_BD = dual.encode_image(
            *prepared([png(image) for image in images], dual.dual)
        )
        text_ND = dual.encode_text(captions)
    return torch.cat((image_BD, text_ND))


def opened(folder: Path, *, has_code: bool = True) -> Any:
    """The exported model, in float32."""
    return open_folder(folder, has_code=has_code)
