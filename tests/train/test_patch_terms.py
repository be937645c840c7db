"""The terms that read patches, over real towers: any ranks, micro-batches, ZeRO stage and family
are one run."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from train_helpers import run_ranks, tiny_batch, tiny_engine, tiny_step

from llm2clip_plugin.train.averages import ReferenceTower, copy_image_side
from llm2clip_plugin.train.checkpoint import on_host
from llm2clip_plugin.train.losses.base import Features
from llm2clip_plugin.train.losses.patches import PatchCaptions, PatchReference
from llm2clip_plugin.train.model import enable_gradient_checkpointing
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.resize import resize_tower
from llm2clip_plugin.vision.towers import timm_tower

STEPS = 4
TERMS = ("infonce", "patch_reference=2", "patch_captions=0.5")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
POOLS = {
    "siglip": "pooled",
    "dinov2": "cls_mean",
    **dict.fromkeys(("eva02", "naflex", "qwen3_vit"), "mean"),
}
QWEN = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "pos_embed_grid_size": 3,
}


def tiny_dual(family: str, pool: str = "pooled") -> DualEncoder:
    """Three blocks, 2 x 2 patches; embeddings 12 wide, as tiny_batch has them."""
    torch.manual_seed(0)
    towers = {
        "clip": lambda: hf.CLIPVisionModel(
            hf.CLIPVisionConfig(intermediate_size=64, **SIZES)
        ),
        "siglip": lambda: hf.SiglipVisionModel(
            hf.SiglipVisionConfig(intermediate_size=64, **SIZES)
        ),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(mlp_ratio=2, **SIZES)),
        "naflex": lambda: families()["naflex"].vision_class()(
            families()["naflex"]
            .vision_class()
            .config_class(intermediate_size=64, num_patches=4, **SIZES)
        ),
        "qwen3_vit": lambda: resize_tower(
            timm_tower("qwen3_vit_88m_enc", pretrained=False, arguments=QWEN), 8
        ),
        "eva02": lambda: Eva02VisionModel(Eva02Config(intermediate_size=48, **SIZES)),
    }
    return DualEncoder(
        towers[family](), DualConfig(projection_dim=8, llm_width=12, pool=pool)
    ).train()


def batch_of(dual: DualEncoder, step: int, rank: int, world: int) -> dict[str, Any]:
    """NaFlex, Qwen3-VL: images of several aspects, with 1 to 4 of the 4 patches."""
    batch = tiny_batch(step, rank=rank, world=world)
    shapes = torch.tensor([(2, 2), (1, 3), (2, 1), (1, 1), (1, 4)])[
        batch["image_ids"] % 5
    ]
    return batch | (
        {"spatial_shapes": shapes}
        if getattr(dual.tower.config, "keeps_aspect", False)
        else {}
    )


def train(
    rank: int, world: int, ways: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The reported values of a few steps of each way, and the moments afterwards."""
    results = {}
    for name, way in ways.items():
        way = dict(way)
        dual = tiny_dual(way.pop("family", "clip"), way.pop("pool", "pooled"))
        if way.pop("checkpointing", False):
            enable_gradient_checkpointing(dual.tower)
        frozen = copy_image_side(dual)
        engine = tiny_engine(world=world, dual=dual, **way)  # pyright: ignore[reportArgumentType]
        step = tiny_step(
            engine, terms=TERMS, reference=ReferenceTower(engine, 1.0, frozen)
        )
        values = [step(batch_of(dual, i, rank, world))[1] for i in range(STEPS)]
        results[name] = {"values": values, "moments": engine.moments(on_host)}
    return results


ONE = {
    "clip": {"stage": 0},
    "clip cached": {"stage": 0, "micro": 8, "checkpointing": True},
    "clip zero3": {"stage": 3, "micro": 8},
}
for family, pool in POOLS.items():
    ONE[family] = {"stage": 0, "family": family, "pool": pool}
    ONE[f"{family} cached"] = {**ONE[family], "micro": 8, "checkpointing": True}
TWO = {
    "clip zero0": {"stage": 0, "micro": 16},
    "clip zero2": {"stage": 2, "micro": 4, "checkpointing": True},
    "clip zero3": {"stage": 3, "micro": 8},
    "naflex zero3": {
        "stage": 3,
        "micro": 4,
        "checkpointing": True,
        "family": "naflex",
        "pool": "mean",
    },
    "qwen3_vit zero3": {
        "stage": 3,
        "micro": 4,
        "checkpointing": True,
        "family": "qwen3_vit",
        "pool": "mean",
    },
    "eva02 zero1": {"stage": 1, "micro": 16, "family": "eva02", "pool": "mean"},
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(train, 1, ONE)[0]


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    return run_ranks(train, 2, TWO)[0]


def same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """fp32 sums in another order."""
    for ours, theirs in zip(actual["values"], expected["values"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert len(expected["moments"]) > 40
    for key, moment in expected["moments"].items():
        torch.testing.assert_close(actual["moments"][key], moment, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["clip zero3", *(f"{family} cached" for family in ("clip", *POOLS))]
)
def test_micro_batches_and_checkpointing_are_one_run(
    one_rank: dict[str, Any], name: str
):
    same(one_rank[name], one_rank[name.split()[0]])


@pytest.mark.parametrize("name", list(TWO))
def test_two_ranks_are_one(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str
):
    same(two_ranks[name], one_rank[name.split()[0]])


@pytest.mark.parametrize("family", ["clip", *POOLS])
def test_patches_leave_the_reference_and_learn_captions(
    one_rank: dict[str, Any], family: str
):
    first, *_, last = one_rank[family]["values"]
    assert (
        abs(first["loss_patch_reference"]) < 1e-5 < 1e-3 < last["loss_patch_reference"]
    )
    assert last["loss_patch_captions"] < first["loss_patch_captions"]


@pytest.mark.parametrize("term", [PatchReference(), PatchCaptions()])
def test_only_the_patches_that_an_image_has_count(term: Any):
    """With 4 of 6 patches the loss and its gradients are those without the other 2, whatever their
    values."""
    torch.manual_seed(0)
    sides = F.normalize(torch.randn(2, 5, 8), dim=-1)
    names = ("patches_bTH", "reference_patches_bTH", "patch_features_bTD")
    whole = {name: torch.randn(5, 6, 8).requires_grad_() for name in names}
    common = {
        "anchor_bD": sides[0],
        "positive_bkD": sides[1, :, None],
        "log_scale": torch.zeros(1),
    }
    common |= {"bias": torch.zeros(1), "caption_hashes": None, "image_ids": None}
    masked = Features(**common, **whole, spatial_shapes=torch.tensor([[2, 2]] * 5))
    cut = {
        name: value.detach()[:, :4].clone().requires_grad_()
        for name, value in whole.items()
    }
    losses = [term(features) for features in (masked, Features(**common, **cut))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    read = names[2] if term.reads == "patch_features" else names[0]
    for loss in losses:
        loss.backward()
    grad = whole[read].grad
    assert grad is not None
    assert not grad[:, 4:].any()
    torch.testing.assert_close(grad[:, :4], cut[read].grad)
