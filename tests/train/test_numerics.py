"""What stays fp32 under bf16 and fp16: the logit scale in the loss, and the moving averages of the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from train_helpers import TinyDual, run_ranks, tiny_batch, tiny_engine, tiny_step

from llm2clip_plugin.train.host_copies import HostCopies

HALF = {
    "bf16 zero1": {"stage": 1, "precision": "bf16", "micro": 16},
    "bf16 zero1 cached": {"stage": 1, "precision": "bf16", "micro": 4},
    "bf16 zero2": {"stage": 2, "precision": "bf16", "micro": 16},
    "bf16 zero3": {"stage": 3, "precision": "bf16", "micro": 8},
    "fp16 zero2": {"stage": 2, "precision": "fp16", "micro": 8},
}


def allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # torch computes fp16 on any CPU


def scales(rank: int, world: int, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each step: scale and bias in the loss, their fp32 masters before the step, and the scale's rounded copy."""
    allow_fp16()
    results = {}
    for name, way in ways.items():
        dual = TinyDual(bias=True)
        engine = tiny_engine(world=world, dual=dual, lr=1e-4, **way)
        step = tiny_step(engine, terms=("sigmoid",))
        seen, make_loss = [], step._loss
        step._loss = lambda encoded, *rest, seen=seen, loss=make_loss: (seen.append(encoded), loss(encoded, *rest))[1]
        rows: dict[str, list[float]] = {"scale": [], "bias": [], "master": [], "bias master": [], "rounded": []}
        for i in range(5):
            masters = engine.weights(HostCopies())
            rows["master"].append(masters["logit_scale"].item())
            rows["bias master"].append(masters["logit_bias"].item())
            with engine.gathered([dual.logit_scale]):
                rows["rounded"].append(float(dual.logit_scale))
            step(tiny_batch(i, rank=rank, world=world))
            rows["scale"].append(seen[-1].log_scale.item())
            rows["bias"].append(seen[-1].bias.item())
        results[name] = rows
    return results


def test_the_logit_scale_and_bias_in_the_loss_are_the_fp32_masters():
    """A learning rate of 2e-4 moves neither of them by a bf16 ulp, 2^-7 at 2.66."""
    for rows in run_ranks(scales, 2, HALF)[0].values():
        assert rows["scale"] == pytest.approx(rows["master"], abs=1e-6)
        assert rows["bias"] == pytest.approx(rows["bias master"], abs=1e-6)
        assert len(set(rows["scale"])) == len(rows["scale"])  # it moves at every step
        assert all(abs(a - b) > 1e-5 for a, b in zip(rows["scale"][1:], rows["rounded"][1:], strict=True))


def frozen_scale(rank: int, world: int) -> float:
    """The scale in the loss of a module whose logit scale does not train, as by default in stage 1."""
    dual = TinyDual()
    torch.nn.init.constant_(dual.logit_scale.requires_grad_(False), math.log(50))
    step = tiny_step(tiny_engine(stage=1, precision="bf16", dual=dual))
    return step(tiny_batch(0))[1]["logit_scale"]


def test_a_frozen_logit_scale_is_not_rounded():
    assert run_ranks(frozen_scale, 1)[0] == pytest.approx(50, rel=1e-6)  # 49.7 in bf16
