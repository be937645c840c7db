"""Memory that a dry run expects, against measured peaks."""

from __future__ import annotations

import pytest
import torch
from tensor_memory import peak_bytes
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm2clip_plugin.train.model import activation_bytes, enable_gradient_checkpointing
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.towers import use_quick_gelu

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 140, "patch_size": 14}


def tower(kind: str, device: str):
    """A small tower with hidden layers four (EVA02: 8/3) times as wide."""
    with torch.device(device):
        if kind == "eva02":
            return Eva02VisionModel(Eva02Config(**SIZES, intermediate_size=128 * 8 // 3)).train()
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=4 * 128)).train()
        use_quick_gelu(model)
        return model


def activations(model: torch.nn.Module) -> int:
    """Of a tower on the meta device; expected, not measured."""
    return activation_bytes(
        model,
        lambda: [torch.empty(12, 3, 140, 140)],
        lambda pixels: model(pixel_values=pixels).pooler_output.square().mean(),
    )


@pytest.mark.parametrize(("kind", "checkpointing"), [("clip", False), ("eva02", False), ("clip", True)])
def test_expected_activations_are_near_measured_peaks(kind: str, checkpointing: bool):
    """Memory of a forward and backward pass of 12 images, without the gradients themselves."""
    model, expected, pixels = tower(kind, "cpu"), tower(kind, "meta"), torch.randn(12, 3, 140, 140)
    if checkpointing:
        enable_gradient_checkpointing(model)
        enable_gradient_checkpointing(expected)

    def step(images: torch.Tensor) -> None:
        model(pixel_values=images).pooler_output.square().mean().backward()

    step(pixels[:1])
    assert 0.9 < peak_bytes(lambda: step(pixels)) / activations(expected) < 1.1
