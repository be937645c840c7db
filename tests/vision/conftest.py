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


def train_twenty_steps(dual: torch.nn.Module, *, lr: float = 2e-3) -> list[float]:
    """Fit eight made-up pairs; the loss of each step."""
    size = dual.tower.config.image_size
    width = dual.config.llm_width
    pixels = torch.randn(8, 3, size, size)
    embeddings = torch.randn(8, width)
    optimizer = torch.optim.AdamW(
        [p for p in dual.parameters() if p.requires_grad], lr=lr
    )
    losses = []
    for _ in range(20):
        image, text, *_ = dual(pixels, embeddings)
        loss = torch.nn.functional.cross_entropy(
            dual.scale * image @ text.T, torch.arange(8)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
