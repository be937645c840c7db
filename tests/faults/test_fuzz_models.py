"""Damaged files of models: towers with their heads, as Python and LLaVA open them, and the LLM's
adapter."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Format, run_cases
from tiny_llm import save_tiny_llm
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel

from llava_integration.plug.tower import LLM2CLIPVisionTower
from llava_integration.plug.towers import TowerLocation
from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.text.adapter import add_lora, save_adapter
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder, weights_sha256
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import preprocessor_config

SHAPE = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def make_tower(folder: Path) -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(intermediate_size=16, **SHAPE))
    dual = DualEncoder(
        tower, DualConfig(projection_dim=4, llm_width=6, adapter_blocks=1)
    )
    export_tower(dual, folder / "tower", origin="x", metrics={"recall": 0.5})


def load_tower_directory(folder: Path) -> dict[str, Any]:
    """As evaluate and export do."""
    dual, card = load_dual(folder / "tower")
    pixels = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    texts = torch.linspace(-1, 1, 6).view(1, 6)
    with torch.no_grad():
        features = dual(pixels, texts)
    return {
        "features": [part.tolist() for part in features if part is not None],
        "card": vars(card),
        "preprocessor": preprocessor_config(folder / "tower"),
    }


class Arguments:
    mm_vision_select_layer = -2


def load_in_llava(folder: Path) -> dict[str, Any]:
    """As LLaVA's processes do."""
    location = TowerLocation.of(folder / "tower", how="test")
    tower = LLM2CLIPVisionTower("llm2clip", location, Arguments())
    processor = tower.image_processor.to_dict()
    with torch.no_grad():
        features = tower(torch.linspace(-1, 1, 192).view(1, 3, 8, 8))
    return {
        "features": features.tolist(),
        "processor": processor,
        "hidden_size": tower.hidden_size,
    }


@pytest.mark.parametrize(
    "load", [load_tower_directory, load_in_llava], ids=["python", "llava"]
)
def test_a_damaged_tower(load, tmp_path: Path):
    form = Format(
        f"tower clip {load.__name__}", make_tower, load, files=("**/*.safetensors",)
    )
    with contextlib.redirect_stderr(io.StringIO()):
        run_cases(form, tmp_path, cases=30)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm") / "llama", "llama", width=16)


def test_a_damaged_adapter(llm: Path, tmp_path: Path):
    """A cache and a tower refuse another fingerprint than their own: with the same one, embeddings
    must be the same."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        wrapped = add_lora(
            AutoModel.from_pretrained(llm), LoraSettings(r=2), base=str(llm)
        )
        trained = {
            name: torch.randn_like(p)
            for name, p in wrapped.named_parameters()
            if ".lora_" in name
        }
        card = EncoderCard(
            base=str(llm),
            base_sha256=weights_sha256(llm),
            attention="bidirectional",
            pooling="mean",
            layer=-1,
            prompt="p ",
            query_prompt="q ",
            chat_template="",
            include_bos=True,
            max_tokens=32,
        )
        save_adapter(wrapped, trained, card, folder / "adapter")

    expected: list[str] = []

    def load(folder: Path) -> Any:
        encoder = CaptionEncoder(
            EncoderConfig(
                llm=str(llm), adapter=str(folder / "adapter"), compute_dtype="float32"
            )
        )
        fingerprint = encoder.identity().fingerprint
        expected.append(fingerprint)
        if fingerprint != expected[0]:
            raise ContractError("what EmbeddingCache.open raises for another teacher")
        captions = ["a red bicycle", "two dogs"]
        # a query's prompt is in no fingerprint
        return encoder.encode(captions).tolist()

    with contextlib.redirect_stderr(io.StringIO()):
        run_cases(
            Format("adapter", make, load, without=("README.md",)), tmp_path, cases=40
        )
