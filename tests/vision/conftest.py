"""Golden references and tiny towers; runs in the training environment and in LLaVA's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
TRANSFORMERS_TOWERS = REFERENCE / "G_transformers_towers"
TOWERS_ALONE = ["clip_vision", "siglip_vision", "dinov2", "dinov2_swiglu"]
WHOLE_MODELS = ["clip_full", "siglip_full"]


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def read(folder: Path, name: str = "states.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def golden_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()
