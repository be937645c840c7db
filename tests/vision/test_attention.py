"""The attention that a tower trains with."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.towers import use_fastest_attention

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def towers() -> list:
    return [
        Dinov2Model(Dinov2Config(**SIZES)),
        CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
        Eva02VisionModel(Eva02Config(**SIZES, intermediate_size=64)),
    ]


@pytest.mark.skipif(not hasattr(Dinov2Model, "set_attn_implementation"), reason="transformers of the LLaVA environment")
@pytest.mark.parametrize("tower", towers(), ids=["dinov2", "clip", "eva02"])
def test_bf16_on_the_cpu_trains_with_plain_products(tower):
    pixels = torch.randn(2, 3, 28, 28)
    tower.eval()
    with torch.no_grad():
        fused = tower(pixel_values=pixels).last_hidden_state
        use_fastest_attention(tower, CPU, bf16=False)
        assert tower.config._attn_implementation == "sdpa"
        use_fastest_attention(tower, CPU, bf16=True)
        assert tower.config._attn_implementation == "eager"
        plain = tower(pixel_values=pixels).last_hidden_state
    assert torch.allclose(fused, plain, atol=1e-5)
    use_fastest_attention(torch.nn.Linear(1, 1), CPU, bf16=True)  # what is not of transformers stays
