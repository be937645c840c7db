"""The dual encoder: pooling, normalisation, frozen leftovers."""

import math

import pytest
import torch

from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder, heads_state, load_heads
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.parts import final_norm
from llm2clip_plugin.vision.towers import load_tower

from .conftest import TRANSFORMERS_TOWERS, read

POOLS = ["pooled", "cls", "mean", "cls_mean"]


def dual(name: str, **options) -> DualEncoder:
    config = DualConfig(**{"projection_dim": 8, "llm_width": 12, **options})
    return DualEncoder(load_tower(TRANSFORMERS_TOWERS / name), config).eval()


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "dinov2"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_trainable_parameter_gets_a_gradient(name, pool):
    if name == "siglip_vision" and pool.startswith("cls"):
        with pytest.raises(ValueError, match="requires a class token"):
            dual(name, pool=pool)
        return
    model = dual(name, pool=pool, projection_norm=True, logit_bias_init=-10.0)
    image, text, *_ = model(
        read(TRANSFORMERS_TOWERS / name)["pixels"], torch.randn(3, 12)
    )
    assert image.shape == (2, 8)
    assert text.shape == (3, 8)
    assert torch.allclose(image.norm(dim=-1), torch.ones(2))
    assert torch.allclose(text.norm(dim=-1), torch.ones(3))
    logits = model.scale * image @ text.T + model.logit_bias
    logits.square().sum().backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]
    unneeded = [
        n
        for n, p in model.named_parameters()
        if not p.requires_grad and p.grad is not None
    ]
    assert not missing
    assert not unneeded


@pytest.mark.parametrize("name", ["clip_vision", "dinov2"])
def test_pools_are_what_they_say(name):
    golden = read(TRANSFORMERS_TOWERS / name)
    model = dual(name, pool="cls_mean")
    with torch.no_grad():
        joined = model.pool(golden["pixels"])
        cls = dual(name, pool="cls").pool(golden["pixels"])
        mean = dual(name, pool="mean").pool(golden["pixels"])
        pooled = dual(name, pool="pooled").pool(golden["pixels"])
    assert torch.equal(joined, torch.cat((cls, mean), dim=-1))
    # CLIP's and DINOv2's own pooling is the normed class token
    assert torch.allclose(cls, pooled, atol=1e-6)
    if name == "dinov2":
        assert torch.allclose(
            mean, golden["last_hidden_state"][:, 1:].mean(dim=1), atol=2e-5
        )


def test_mean_pool_of_clip_is_normed_per_token():
    golden = read(TRANSFORMERS_TOWERS / "clip_vision")
    weights = read(TRANSFORMERS_TOWERS / "clip_vision", "model.safetensors")
    states = golden["hidden_states_03"][:, 1:]
    weight, bias = (
        weights[f"vision_model.post_layernorm.{part}"] for part in ("weight", "bias")
    )
    expected = torch.nn.functional.layer_norm(
        states, states.shape[-1:], weight, bias, 1e-5
    ).mean(dim=1)
    with torch.no_grad():
        assert torch.allclose(
            dual("clip_vision", pool="mean").pool(golden["pixels"]), expected, atol=2e-5
        )


@pytest.mark.parametrize(
    "name, pool",
    [("clip_vision", "pooled"), ("siglip_vision", "mean"), ("dinov2", "cls_mean")],
)
def test_patches_are_a_hidden_state_without_class_token_and_their_features_an_image_of_one_token(
    name, pool
):
    golden = read(TRANSFORMERS_TOWERS / name)
    *_, before_last, _ = sorted(
        key for key in golden if key.startswith("hidden_states_")
    )
    expected = golden[before_last][:, int(name != "siglip_vision") :]
    model = dual(name, pool=pool, projection_norm=True)
    with torch.no_grad():
        image, patches, features = model.encode_with_patches(
            golden["pixels"], patches=-2, patch_features=-2
        )
        normed = final_norm(model.tower)(expected)
        joined = torch.cat([normed, normed], dim=-1) if pool == "cls_mean" else normed
        projected = model.visual_projection(model.visual_norm(joined))
        assert torch.allclose(image, model.encode_image(golden["pixels"]), atol=1e-6)
    assert torch.allclose(patches, expected, atol=2e-5)
    assert torch.allclose(
        features, torch.nn.functional.normalize(projected, dim=-1), atol=2e-5
    )


def test_scale_is_a_vector_of_one_and_clamped():
    model = dual("clip_vision")
    assert model.logit_scale.shape == (1,)  # DeepSpeed refuses 0-dim parameters
    assert math.isclose(model.scale.item(), 1 / 0.07, rel_tol=1e-6)
    model.logit_scale.data.fill_(math.log(250))
    assert model.scale.item() == 100


def test_training_continues_from_the_heads_of_a_directory(tmp_path):
    first = dual("clip_vision", pool="mean", input_noise=0.5)
    first.logit_scale.data.fill_(3.0)
    export_tower(first, tmp_path / "tower", origin="x")
    again = dual("clip_vision", pool="mean")  # another noise is no other head
    load_heads(again, tmp_path / "tower")
    assert all(
        torch.equal(value, heads_state(first)[name])
        for name, value in heads_state(again).items()
    )
    with pytest.raises(
        ValueError,
        match=r"saved with pool 'mean' \(not 'cls'\), adapter_blocks 4 \(not 2\); set dual",
    ):
        load_heads(
            dual("clip_vision", pool="cls", adapter_blocks=2), tmp_path / "tower"
        )
