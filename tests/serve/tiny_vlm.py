"""Vision-language models of tiny towers and tiny LLMs."""

import functools
import tempfile
from pathlib import Path

import pytest
import transformers
from serve_checkpoints import tower_directory
from tiny_clip import TINY
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.resize import resize_tower
from llm2clip_plugin.vision.towers import timm_tower

TOWERS = ("clip", "siglip", "dinov3", "eva02", "pe_core")  # pe_core: timm's


LLMS = ("smollm2", "qwen3", "gemma3")


MADE = tempfile.TemporaryDirectory(prefix="towers-")  # removed when the process ends


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llms")
    for name in (*LLMS, "llama", "qwen2", "mistral", "phi3", "gemma2"):
        save_tiny_llm(root / name, name)
    return root


@functools.cache
def place(name: str) -> Path:
    """The folder of a tower of that name."""
    made = Path(MADE.name) / name
    if name == "naflex":
        config = transformers.Siglip2VisionConfig(**TINY, num_patches=16, patch_size=7)
        transformers.Siglip2VisionModel(config).save_pretrained(made / "published")
        import_tower(made / "published", made / "imported")
        return made / "imported"
    if name == "qwen3_vit":
        arguments = {"depth": 2, "embed_dim": 64, "num_heads": 4}
        resize_tower(
            timm_tower("qwen3_vit_88m_enc", pretrained=False, arguments=arguments), 64
        ).save_pretrained(made)
        return made
    return tower_directory(name)


def build(tower: str, llm: Path, output: Path, *more: str) -> Path:
    words = [
        "--tower",
        str(place(tower)),
        "--llm",
        str(llm),
        "--output",
        str(output),
        *more,
    ]
    assert llm2clip(["vlm", "build", *words]) == 0
    return output


@pytest.fixture(scope="module")
def built(llms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and Qwen 3."""
    return build("clip", llms / "qwen3", tmp_path_factory.mktemp("vlm") / "clip-qwen3")
