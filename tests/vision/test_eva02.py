"""EVA02 and EVA01 against the reference: every state, from the reference's own names, in fp32."""

import pytest
import torch
import torch.nn.functional as F

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.eva02 import (
    Eva02Config,
    Eva02SwiGLU,
    Eva02VisionModel,
    _GatedSiLU,
    complex_turns,
    rope_tables,
    rotate,
)
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.lora import add_lora
from llm2clip_plugin.vision.parts import tower_blocks

from .conftest import (
    REFERENCE,
    golden_config,
    largest_difference,
    read,
    train_twenty_steps,
)

TOWERS = REFERENCE / "A_vision_towers"
NAMES = [
    "eva01_b16",
    "eva01_g14",
    "eva02_b16",
    "eva02_bige14",
    "eva02_l14",
    "eva02_l14_336",
]
TOLERANCE = 2e-5  # the goldens' own: float64 differs by 4.1e-6, timm by 3.9e-6


def check_states(tower, golden) -> None:
    with torch.no_grad():
        output = tower(pixel_values=golden["pixels"], output_hidden_states=True)
    keys = [
        "after_patch_embed_and_pos",
        *sorted(key for key in golden if key.startswith("block_")),
    ]
    assert len(output.hidden_states) == len(keys) == len(tower_blocks(tower)) + 1
    for key, state in zip(keys, output.hidden_states, strict=True):
        assert largest_difference(state, golden[key]) < TOLERANCE, key
    assert (
        largest_difference(output.last_hidden_state, golden["after_final_norm"])
        < TOLERANCE
    )
    assert largest_difference(output.pooler_output, golden["pooled"]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_every_state_equals_the_reference(name, tmp_path):
    folder = TOWERS / name
    golden = read(TOWERS / name)
    card, _ = import_tower(
        folder / "weights.safetensors",
        tmp_path / "tower",
        config=folder / "config.json",
    )
    assert card.family == "eva02"
    assert card.has_cls is True
    assert card.projection_dim == golden_config(folder)["embed_dim"]
    check_states(load_tower(tmp_path / "tower"), golden)
    dual = load_dual_encoder(tmp_path / "tower")
    with torch.no_grad():
        embedding = dual.dual.visual_projection(dual.dual.pool(golden["pixels"]))
        assert largest_difference(embedding, golden["embedding"]) < TOLERANCE
        assert (
            largest_difference(
                dual.encode_image(golden["pixels"]), golden["embedding_normalized"]
            )
            < TOLERANCE
        )


def test_224_to_336(tmp_path):
    folder = TOWERS / "eva02_l14_224_to_336"
    golden = read(TOWERS / "eva02_l14_224_to_336")
    card, _ = import_tower(
        folder / "weights.safetensors", tmp_path / "tower", image_size=42
    )
    assert card.image_size == 42
    assert card.training["resized_from"] == 28
    tower = load_tower(tmp_path / "tower")
    assert torch.equal(tower.embeddings.position_embedding, golden["resized_pos_embed"])
    check_states(tower, golden)
    with torch.no_grad():
        encoded = load_dual_encoder(tmp_path / "tower").encode_image(golden["pixels"])
    assert largest_difference(encoded, golden["embedding_normalized"]) < TOLERANCE


def tiny_config(**changes) -> Eva02Config:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 85,
    }
    return Eva02Config(
        **{
            **sizes,
            "image_size": 28,
            "patch_size": 7,
            "rope_pretrained_grid": 4,
            **changes,
        }
    )


VARIANTS = {
    "eva02": {},
    "bigE": {"hidden_act": "gelu", "sub_norm": False, "rope": False, "post_norm": True},
    "eva01": {
        "hidden_act": "gelu",
        "sub_norm": False,
        "rope": False,
        "layer_scale": True,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_and_fused_attention_are_the_same_and_are_really_chosen(
    variant, tmp_path, monkeypatch
):
    Eva02VisionModel(tiny_config(**VARIANTS[variant])).save_pretrained(tmp_path)
    fused, plain = (
        Eva02VisionModel.from_pretrained(tmp_path, attn_implementation=way)
        for way in ("sdpa", "eager")
    )
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or kernel(*qkv)
    )
    outputs = [tower.double().train()(pixels) for tower in (fused, plain)]
    assert len(calls) == len(fused.blocks)  # the fused one's alone
    assert (
        largest_difference(outputs[0].last_hidden_state, outputs[1].last_hidden_state)
        < 1e-9
    )
    for output in outputs:
        output.pooler_output[:, 0].sum().backward()
    for (name, parameter), (_, other_parameter) in zip(
        fused.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert parameter.grad.any(), name
        assert largest_difference(parameter.grad, other_parameter.grad) < 1e-7, name
    # where nothing is said
    assert Eva02VisionModel(tiny_config()).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_twenty_steps_and_comes_back(variant, tmp_path):
    tower = Eva02VisionModel(tiny_config(**VARIANTS[variant]))
    dual = DualEncoder(tower, DualConfig(projection_dim=16, llm_width=12)).train()
    dual.tower.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    losses = train_twenty_steps(dual, lr=3e-3)
    pixels = torch.randn(2, 3, 28, 28)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in dual.parameters())
    export_tower(dual, tmp_path / "tower", origin="tiny")
    with torch.no_grad():
        assert torch.equal(
            load_dual_encoder(tmp_path / "tower").encode_image(pixels),
            dual.eval().encode_image(pixels),
        )


def test_rotation_of_complex_pairs_is_the_rotation_of_channels():
    cos, sin = rope_tables(grid=4, pretrained_grid=7, head_width=8)
    sin[:, 0::2] *= -1
    x = torch.randn(2, 16, 3, 8, requires_grad=True)
    # float64 takes the way of half precisions on a GPU
    y = x.detach().double().requires_grad_()
    turns = complex_turns(cos, sin, torch.bfloat16)
    assert turns is not None
    assert turns.is_complex()
    assert complex_turns(cos, sin, torch.float64) is None
    turned = rotate(x, cos, sin, turns)
    expected = rotate(y, cos.double(), sin.double())
    half = rotate(x.detach().bfloat16(), cos, sin, turns)
    assert half.dtype == torch.bfloat16
    assert largest_difference(half, expected) < 2e-2
    assert largest_difference(turned, expected) < 1e-6
    weight = torch.randn_like(turned)
    (turned * weight).sum().backward()
    (expected * weight).sum().backward()
    assert largest_difference(x.grad, y.grad) < 1e-6
    # as ONNX has it
    plain = torch.jit.trace(
        lambda z: rotate(z, cos.double(), sin.double()), y.detach()
    )(y.detach())
    assert largest_difference(plain, expected) < 1e-12
    assert torch.autograd.gradcheck(rotate, (y[:1, :, :1], cos.double(), sin.double()))


def test_the_gated_silu_has_the_gradients_of_its_formula():
    gate, up = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    for width in (5, 4):
        assert torch.autograd.gradcheck(_GatedSiLU.apply, (gate, up, width))
        assert torch.equal(
            _GatedSiLU.apply(gate, up, width), F.silu(gate[:, :width]) * up[:, :width]
        )


def test_a_padded_hidden_width_changes_neither_outputs_nor_gradients_nor_files(
    monkeypatch,
):
    """As on a GPU; a LoRA on the layers turns it off."""
    tower = Eva02VisionModel(tiny_config()).double()
    pixels = torch.randn(2, 3, 28, 28).double()
    results = []
    for padded in (False, True):
        monkeypatch.setattr(Eva02SwiGLU, "_pads", lambda *_, padded=padded: padded)
        with torch.no_grad():
            frozen = tower(pixels).last_hidden_state
        output = tower(pixels).last_hidden_state
        tower.zero_grad()
        output[..., 0].sum().backward()
        results.append(
            {
                "frozen": frozen,
                "trained": output,
                **{n: p.grad.clone() for n, p in tower.named_parameters()},
            }
        )
    for name, value in results[0].items():
        assert largest_difference(value, results[1][name]) < 1e-9, name
    assert tower.state_dict()["blocks.0.mlp.gate_proj.weight"].shape == (85, 32)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    mlp = tower.blocks[0].mlp
    assert mlp._pads(pixels)
    add_lora(tower, rank=2, alpha=4)
    assert not tower.blocks[0].mlp._pads(pixels)
