"""The terms that read patches, over real towers: any ranks, micro-batches, ZeRO stage and family are one run."""

from typing import Any

import pytest
import torch
import transformers as hf
from train_helpers import run_ranks, tiny_batch, tiny_engine, tiny_step

from llm2clip_plugin.train.checkpoint import on_host
from llm2clip_plugin.train.engine import Reference, frozen_copy
from llm2clip_plugin.train.model import enable_gradient_checkpointing
from llm2clip_plugin.vision import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel

STEPS = 4
TERMS = ("infonce", "patch_reference=2", "patch_captions=0.5")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def tiny_dual(family: str, pool: str = "pooled") -> DualEncoder:
    """Three blocks, 2 x 2 patches; embeddings 12 wide, as tiny_batch has them."""
    torch.manual_seed(0)
    towers = {
        "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(intermediate_size=64, **SIZES)),
        "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(intermediate_size=64, **SIZES)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(mlp_ratio=2, **SIZES)),
        "eva02": lambda: Eva02VisionModel(Eva02Config(intermediate_size=48, **SIZES)),
    }
    return DualEncoder(towers[family](), DualConfig(projection_dim=8, llm_width=12, pool=pool)).train()


def train(rank: int, world: int, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The reported values of a few steps of each way, and the moments afterwards."""
    results = {}
    for name, way in ways.items():
        way = dict(way)
        dual = tiny_dual(way.pop("family", "clip"), way.pop("pool", "pooled"))
        if way.pop("checkpointing", False):
            enable_gradient_checkpointing(dual.tower)
        frozen = frozen_copy(dual)
        engine = tiny_engine(world=world, dual=dual, **way)  # pyright: ignore[reportArgumentType]
        step = tiny_step(engine, terms=TERMS, reference=Reference(engine, 1.0, module=frozen))
        values = [step(tiny_batch(i, rank=rank, world=world))[1] for i in range(STEPS)]
        results[name] = {"values": values, "moments": engine.moments(on_host)}
    return results


ONE = {
    "clip": {"stage": 0},
    "clip cached": {"stage": 0, "micro": 8, "checkpointing": True},
    "clip zero3": {"stage": 3, "micro": 8},
}
for family, pool in (("siglip", "pooled"), ("dinov2", "cls_mean"), ("eva02", "mean")):
    ONE[family] = {"stage": 0, "family": family, "pool": pool}
    ONE[f"{family} cached"] = {**ONE[family], "micro": 8, "checkpointing": True}
TWO = {
    "clip zero0": {"stage": 0, "micro": 16},
    "clip zero2": {"stage": 2, "micro": 4, "checkpointing": True},
    "clip zero3": {"stage": 3, "micro": 8},
    "eva02 zero1": {"stage": 1, "micro": 16, "family": "eva02", "pool": "mean"},
}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(train, 1, ONE)[0]


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(train, 2, TWO)[0]


def same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """fp32 sums in another order."""
    for ours, theirs in zip(actual["values"], expected["values"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert len(expected["moments"]) > 40
    for key, moment in expected["moments"].items():
        torch.testing.assert_close(actual["moments"][key], moment, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["clip cached", "clip zero3", "siglip cached", "dinov2 cached", "eva02 cached"])
def test_micro_batches_and_checkpointing_are_one_run(one: dict[str, Any], name: str):
    same(one[name], one[name.split()[0]])


@pytest.mark.parametrize("name", list(TWO))
def test_two_ranks_are_one(one: dict[str, Any], two: dict[str, Any], name: str):
    same(two[name], one[name.split()[0]])


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "eva02"])
def test_patches_leave_the_reference_and_learn_captions(one: dict[str, Any], family: str):
    first, *_, last = one[family]["values"]
    assert abs(first["loss_patch_reference"]) < 1e-5 < 1e-3 < last["loss_patch_reference"]
    assert last["loss_patch_captions"] < first["loss_patch_captions"]
