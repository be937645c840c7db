"""The step under DeepSpeed: any ZeRO stage, precision, number of ranks and of micro-batches gives
the same run."""

import math
from typing import Any

import pytest
import torch
from train_helpers import (
    TinyDual,
    allow_fp16,
    run_ranks,
    tiny_batch,
    tiny_engine,
    tiny_step,
)

from llm2clip_plugin.train.checkpoint import on_host
from llm2clip_plugin.train.step import TowerStep

STEPS = 4


def train(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Losses of a few steps and the weights afterwards."""
    options = dict(options)
    torch.manual_seed(0)
    terms = options.pop("terms", ("infonce",))
    captions = options.pop("captions", 1)
    noise = options.pop("noise", 0.0)
    dropout = options.pop("dropout", 0.0)
    dual = TinyDual(noise=noise, dropout=dropout, bias="sigmoid" in terms)
    engine = tiny_engine(world=world, dual=dual, **options)
    step = tiny_step(engine, terms=terms, noisy=dual.noise > 0)
    losses = []
    norms = []
    for i in range(STEPS):
        loss, _ = step(tiny_batch(i, rank=rank, world=world, captions=captions))
        losses.append(loss)
        norms.append(engine.grad_norm)
    return {
        "losses": losses,
        "norms": norms,
        "weights": engine.weights(on_host),
        "moments": engine.moments(on_host),
    }


def train_all(
    rank: int, world: int, runs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    allow_fp16()
    return {name: train(rank, world, options) for name, options in runs.items()}


SUM = ("infonce=0.5:1@0.5", "cosine=0.3", "multi_positive=1:0")
ONE_RANK = {
    "plain": {"stage": 0, "micro": 32},
    "cached": {"stage": 0, "micro": 4},
    "zero2 cached": {"stage": 2, "micro": 8},
    "zero3": {"stage": 3, "micro": 32},
    "zero3 cached": {"stage": 3, "micro": 8},
    "zero2 offload": {"stage": 2, "micro": 32, "offload": True},
    "bf16 zero0": {"stage": 0, "precision": "bf16"},
    "bf16 zero1": {"stage": 1, "precision": "bf16"},
    "bf16 zero1 cached": {"stage": 1, "precision": "bf16", "micro": 8},
    "bf16 zero3": {"stage": 3, "precision": "bf16"},
    "fp16 zero1 cached": {"stage": 1, "precision": "fp16", "micro": 8},
    "fp16 zero3": {"stage": 3, "precision": "fp16"},
    "sigmoid": {"stage": 0, "terms": ("sigmoid",)},
    "sigmoid cached": {"stage": 1, "terms": ("sigmoid",), "micro": 4},
    "sum": {"stage": 0, "terms": SUM, "captions": 2, "noise": 0.5},
    "sum cached": {"stage": 1, "terms": SUM, "captions": 2, "noise": 0.5, "micro": 8},
    "cosine": {"stage": 0, "terms": ("cosine",)},
    "cosine cached": {"stage": 3, "terms": ("cosine",), "micro": 8},
    "noise": {"stage": 0, "noise": 0.5, "micro": 32},
    "noise cached": {"stage": 1, "noise": 0.5, "micro": 4},
    "dropout": {"stage": 0, "dropout": 0.3, "micro": 16, "noise": 0.5},
}
TWO_RANKS = {
    "zero0": {"stage": 0, "micro": 16},
    "zero1": {"stage": 1, "micro": 16},
    "zero2 cached": {"stage": 2, "micro": 4},
    "zero3": {"stage": 3, "micro": 16},
    "zero3 cached": {"stage": 3, "micro": 8},
    "zero2 offload": {"stage": 2, "micro": 16, "offload": True},
    "bf16 zero1": {"stage": 1, "precision": "bf16", "micro": 16},
    "bf16 zero2": {"stage": 2, "precision": "bf16", "micro": 16},
    "noise": {"stage": 1, "noise": 0.5, "micro": 8},
    "sum": {"stage": 2, "terms": SUM, "captions": 2, "noise": 0.5, "micro": 8},
    "cosine": {"stage": 1, "terms": ("cosine",), "micro": 16},
    "dropout": {"stage": 2, "dropout": 0.3, "micro": 16, "noise": 0.5},
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(train_all, 1, ONE_RANK)[0]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(train_all, 2, TWO_RANKS)


def same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert actual["losses"] == pytest.approx(expected["losses"], abs=tolerance)


def test_the_loss_falls(one_rank: dict[str, Any]):
    losses = one_rank["plain"]["losses"]
    assert losses[-1] < losses[0] - 0.3
    # so clipping is at work
    assert min(one_rank["plain"]["norms"]) > 0
    assert max(one_rank["plain"]["norms"]) > 1


@pytest.mark.parametrize(
    "name", ["cached", "zero2 cached", "zero3", "zero3 cached", "zero2 offload"]
)
def test_one_rank_fp32_is_one_run(one_rank: dict[str, Any], name: str):
    """Sums in another order: 1e-6 a step in the loss. AdamW makes whole steps of tiny gradients:
    1e-4 in weights."""
    same(one_rank[name], one_rank["plain"], 1e-5)
    for key, weight in one_rank["plain"]["weights"].items():
        torch.testing.assert_close(
            one_rank[name]["weights"][key], weight, atol=1e-4, rtol=1e-3
        )
    for key, moment in one_rank["plain"]["moments"].items():
        torch.testing.assert_close(
            one_rank[name]["moments"][key], moment, atol=1e-5, rtol=1e-3
        )


@pytest.mark.parametrize(
    "name", ["zero0", "zero1", "zero2 cached", "zero3", "zero3 cached", "zero2 offload"]
)
def test_two_ranks_fp32_equal_one(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]], name: str
):
    same(two_ranks[0][name], one_rank["plain"], 1e-5)
    assert two_ranks[0][name]["losses"] == two_ranks[1][name]["losses"]
    for key, moment in one_rank["plain"]["moments"].items():
        torch.testing.assert_close(
            two_ranks[0][name]["moments"][key], moment, atol=1e-5, rtol=1e-3
        )


@pytest.mark.parametrize(
    "name", [name for name in ONE_RANK if name.startswith(("bf16", "fp16"))]
)
def test_half_precision_follows_fp32(one_rank: dict[str, Any], name: str):
    """bf16 has 8 bits: losses near 4 move by a few hundredths; fp16 has 11, and Adam's first steps
    turn a rounded gradient near 0 into a whole step: .021 after four."""
    same(one_rank[name], one_rank["plain"], 0.1 if name.startswith("bf16") else 0.04)
    assert one_rank[name]["losses"] != one_rank["plain"]["losses"]


def test_any_terms_are_one_run_over_ranks_and_micro_batches(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
):
    """Weights that change, several captions an image with noise, a term that leaves the logit scale
    untouched."""
    same(one_rank["sigmoid cached"], one_rank["sigmoid"], 1e-5)
    for name in ("sum", "cosine"):
        same(one_rank[f"{name} cached"], one_rank[name], 1e-5)
        same(two_ranks[0][name], one_rank[name], 1e-5)
        assert one_rank[name]["losses"][-1] < one_rank[name]["losses"][0] - 0.1


def test_random_draws_belong_to_samples(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
):
    """Text noise is the same whatever the ranks and micro-batches, dropout whatever the ranks."""
    same(one_rank["noise cached"], one_rank["noise"], 1e-5)
    same(two_ranks[0]["noise"], one_rank["noise"], 1e-5)
    same(two_ranks[0]["dropout"], one_rank["dropout"], 1e-5)
    assert one_rank["noise"]["losses"][0] != pytest.approx(
        one_rank["plain"]["losses"][0], abs=1e-3
    )
    assert one_rank["dropout"]["losses"][0] != pytest.approx(
        one_rank["noise"]["losses"][0], abs=1e-3
    )


def test_noise_is_drawn_once_for_both_passes():
    step = object.__new__(TowerStep)
    micro = {"embeddings": torch.zeros(2, 2, 8), "first": 7}
    step.seed = 5
    second = step._noise({"embeddings": torch.zeros(1, 2, 8), "first": 8})
    assert step._noise(micro) is step._noise(micro)
    assert torch.equal(step._noise(micro)[1:], second)


def clamp(rank: int, world: int) -> tuple[float, float]:
    """A logit scale pushed over its bound comes back to ln 100: master, working copy, and scale of
    the next loss."""
    dual = TinyDual()
    torch.nn.init.constant_(dual.logit_scale, 4.7)
    engine = tiny_engine(
        stage=3, dual=dual, world=world, micro=16, lr=1e-4, precision="bf16"
    )
    step = tiny_step(engine)
    step(tiny_batch(0, rank=rank, world=world))
    masters = engine.weights(on_host)
    with engine.gathered([dual.logit_scale]):
        assert float(dual.logit_scale) == pytest.approx(
            float(masters["logit_scale"]), abs=0.02
        )
    return float(masters["logit_scale"][0]), step(
        tiny_batch(1, rank=rank, world=world)
    )[1]["logit_scale"]


def test_the_scale_stays_bounded_on_all_ranks():
    for result in run_ranks(clamp, 2):
        # 98.86 in bf16
        assert result == pytest.approx((math.log(100), 100.0), rel=1e-6)
