"""Memory that a dry run expects, against measured peaks."""

from __future__ import annotations

import pytest
import torch
from tensor_memory import peak_bytes
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm2clip_plugin.train.model import StepMemory, activation_bytes, enable_gradient_checkpointing, rank_bytes
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.towers import use_quick_gelu

SIZES = {"size": 140, "width": 128, "blocks": 4}


def tower(kind: str, *, size: int = 56, width: int = 64, blocks: int = 3, device: str = "meta"):
    """A small tower with hidden layers four (EVA02: 8/3) times as wide."""
    common = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": 14,
    }
    with torch.device(device):
        if kind == "eva02":
            return Eva02VisionModel(Eva02Config(**common, intermediate_size=width * 8 // 3)).train()
        model = CLIPVisionModel(CLIPVisionConfig(**common, intermediate_size=4 * width)).train()
        use_quick_gelu(model)
        return model


def activations(model: torch.nn.Module, dtype: torch.dtype = torch.float32, images: int = 12) -> int:
    """Of a tower on the meta device; expected, not measured."""
    size = model.config.image_size
    return activation_bytes(
        model.to(dtype),
        lambda: [torch.empty(images, 3, size, size, dtype=dtype)],
        lambda pixels: model(pixel_values=pixels).pooler_output.square().mean(),
    )


@pytest.mark.parametrize(("kind", "checkpointing"), [("clip", False), ("eva02", False), ("clip", True)])
def test_expected_activations_are_near_measured_peaks(kind: str, checkpointing: bool):
    """Memory of a forward and backward pass of 12 images, without the gradients themselves."""
    model, pixels = tower(kind, **SIZES, device="cpu"), torch.randn(12, 3, 140, 140)
    expected = tower(kind, **SIZES)
    if checkpointing:
        enable_gradient_checkpointing(model)
        enable_gradient_checkpointing(expected)

    def step(images: torch.Tensor) -> None:
        model(pixel_values=images).pooler_output.square().mean().backward()

    step(pixels[:1])
    assert 0.9 < peak_bytes(lambda: step(pixels)) / activations(expected) < 1.1


def step_memory(**changes) -> StepMemory:
    fields = {
        "precision": "bf16",
        "trained": 1000,
        "frozen_bytes": 200,
        "parameters": 1100,
        "pair_bytes": 37,
        "width": 5,
        "state_bytes": 8.0,
        "pixels": 7,
    }
    return StepMemory(**{**fields, **changes})


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "adamw"),
    [(0, 2200, 2000, 8000), (1, 2200, 2000, 1500), (2, 2200, 250, 1500), (3, 275, 250, 1500)],
)
def test_stages_of_zero(stage: int, weights: float, gradients: float, adamw: float):
    found = rank_bytes(step_memory(), {"stage": stage}, world=8, global_batch=64, micro_batch=8)
    assert (found["weights"], found["gradients"], found["AdamW"]) == (weights, gradients, adamw)
    assert found["activations"] == 8 * 37 and found["images"] == 7 * (8 + 8 * 2)
    cached = rank_bytes(step_memory(), {"stage": stage}, world=8, global_batch=64, micro_batch=4)
    assert cached["gradients"] == 3 * gradients  # summed over micro-batches in fp32
    assert cached["activations"] == found["activations"] / 2
