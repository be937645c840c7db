"""What a tower trains with: attention, and QuickGELU with transformers' values bit for bit, its
gradient, less kept."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.activations import QuickGELUActivation

from llm2clip_plugin import load_tower
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.fast import QuickGELU, use_fastest_attention, use_quick_gelu

from .conftest import TRANSFORMERS_TOWERS, read

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def towers() -> list:
    return [
        Dinov2Model(Dinov2Config(**SIZES)),
        CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
        Eva02VisionModel(Eva02Config(**SIZES, intermediate_size=64)),
    ]


@pytest.mark.skipif(
    not hasattr(Dinov2Model, "set_attn_implementation"),
    reason="transformers of the LLaVA environment",
)
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
    # what is not of transformers stays
    use_fastest_attention(torch.nn.Linear(1, 1), CPU, bf16=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_values_bit_for_bit_and_the_same_gradient(dtype):
    x = torch.cat(
        (torch.randn(4000) * 3, torch.tensor([0.0, -0.0, 60.0, -60.0, 1e-6]))
    ).to(dtype)
    ours, theirs, exact = (x.clone().requires_grad_() for _ in range(3))
    weights = torch.randn(len(x)).to(dtype)
    assert torch.equal(QuickGELU()(ours), QuickGELUActivation()(theirs))
    (QuickGELU()(ours) * weights).sum().backward()
    (QuickGELUActivation()(theirs) * weights).sum().backward()
    exact = x.double().requires_grad_()
    (QuickGELUActivation()(exact) * weights.double()).sum().backward()
    error, other = (
        (values.grad.double() - exact.grad).abs().max().item()
        for values in (ours, theirs)
    )
    assert error <= max(1.5 * other, 1e-6)  # no worse than transformers' own


def gradients(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}


def test_a_tower_computes_the_same_with_it():
    pixels = read(TRANSFORMERS_TOWERS / "clip_vision")["pixels"]
    plain, ours = (
        load_tower(TRANSFORMERS_TOWERS / "clip_vision").train() for _ in range(2)
    )
    assert use_quick_gelu(ours) == plain.config.num_hidden_layers
    assert use_quick_gelu(ours) == 0  # none is left
    outputs = [
        tower(pixel_values=pixels, output_hidden_states=True) for tower in (plain, ours)
    ]
    hidden, other_hidden = (output.hidden_states for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(hidden, other_hidden, strict=True))
    for output in outputs:
        output.pooler_output.square().sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-4, atol=1e-6)
