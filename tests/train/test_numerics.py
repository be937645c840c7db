"""What stays fp32 under bf16 and fp16: the logit scale in the loss, and the moving averages of the
weights."""

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

from llm2clip_plugin.train.averages import (
    ReferenceTower,
    WeightAverage,
    copy_image_side,
)
from llm2clip_plugin.train.checkpoint import on_host

HALF = {
    "bf16 zero1": {"stage": 1, "precision": "bf16", "micro": 16},
    "bf16 zero1 cached": {"stage": 1, "precision": "bf16", "micro": 4},
    "bf16 zero2": {"stage": 2, "precision": "bf16", "micro": 16},
    "bf16 zero3": {"stage": 3, "precision": "bf16", "micro": 8},
    "fp16 zero2": {"stage": 2, "precision": "fp16", "micro": 8},
}


def scales(
    rank: int, world: int, ways: dict[str, dict[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    """For each step: scale and bias in the loss, their fp32 masters before the step, and the
    scale's rounded copy."""
    allow_fp16()
    results = {}
    for name, way in ways.items():
        dual = TinyDual(bias=True)
        engine = tiny_engine(world=world, dual=dual, lr=1e-4, **way)
        step = tiny_step(engine, terms=("sigmoid",))
        seen = []
        make_loss = step._loss
        step._loss = lambda encoded, *rest, seen=seen, loss=make_loss: (
            seen.append(encoded),
            loss(encoded, *rest),
        )[1]
        rows: dict[str, list[float]] = {
            "scale": [],
            "bias": [],
            "master": [],
            "bias master": [],
            "rounded": [],
        }
        for i in range(5):
            masters = engine.weights(on_host)
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
        assert all(
            abs(a - b) > 1e-5
            for a, b in zip(rows["scale"][1:], rows["rounded"][1:], strict=True)
        )


def frozen_scales(rank: int, world: int) -> list[float]:
    """The scale in the loss of a module whose logit scale does not train, as by default in
    stage 1."""
    scales = []
    for stage in (1, 3):
        dual = TinyDual()
        torch.nn.init.constant_(dual.logit_scale.requires_grad_(False), math.log(50))
        step = tiny_step(tiny_engine(stage=stage, precision="bf16", dual=dual))
        scales.append(step(tiny_batch(0))[1]["logit_scale"])
    return scales


def test_a_frozen_logit_scale_is_not_rounded():
    # 49.7 in bf16
    assert run_ranks(frozen_scales, 1)[0] == pytest.approx([50, 50], rel=1e-6)


DECAY = 0.9


def average(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Both averages over three steps at a learning rate that bf16 weights hardly notice; then a
    checkpoint."""
    allow_fp16()
    results = {}
    for name, way in {"fp32 zero0": {"stage": 0, "micro": 16}, **HALF}.items():
        torch.manual_seed(0)
        dual = TinyDual()
        initial = {n: p.detach().clone() for n, p in dual.named_parameters()}
        frozen = copy_image_side(dual)
        engine = tiny_engine(world=world, dual=dual, lr=1e-6, **way)
        step = tiny_step(engine)
        mean = WeightAverage(engine, DECAY, warmup=True)
        reference = ReferenceTower(engine, DECAY, frozen)
        masters = [engine.weights(on_host)]
        with engine.gathered(list(dual.parameters())):
            before = {n: p.detach().clone() for n, p in dual.named_parameters()}
        for i in range(3):
            step(tiny_batch(i, rank=rank, world=world))
            mean.update()
            reference.update()
            masters.append(engine.weights(on_host))
        with engine.gathered(list(dual.parameters())):
            still = sum(int((p == before[n]).sum()) for n, p in dual.named_parameters())
        size = sum(value.numel() for value in before.values())
        values = {
            "initial": initial,
            "masters": masters,
            "after": engine.weights(on_host),
            "still": still / size,
        }
        values |= {"mean": mean.values(on_host), "reference": reference.values(on_host)}
        values["shown"] = {n: p.float() for n, p in frozen.named_parameters()}
        results[name] = {
            **values,
            "held": sum(shard.numel() for shard in mean.averages) / size,
        }
    return results


def followed(
    masters: list[dict[str, torch.Tensor]], name: str, *, warmup: bool
) -> torch.Tensor:
    """The average of a weight by hand, in float64."""
    expected = masters[0][name].double()
    for n, weights in enumerate(masters[1:], 1):
        decay = min(DECAY, (1 + n) / (10 + n)) if warmup else DECAY
        expected = decay * expected + (1 - decay) * weights[name].double()
    return expected.float()


def test_averages_are_of_fp32_masters_on_two_ranks():
    """An lr of 1e-6 is below half an ulp of most bf16 weights: an average of those would stay where
    it began.

    Three updates of the average round by an fp32 ulp each: 3e-7."""
    ranks = run_ranks(average, 2)
    for name, run in ranks[0].items():
        for key, value in run["mean"].items():
            torch.testing.assert_close(
                value, followed(run["masters"], key, warmup=True), atol=1e-7, rtol=3e-7
            )
            # not what bf16 has left of it
            assert torch.equal(run["masters"][0][key], run["initial"][key])
            assert not torch.equal(value, run["initial"][key]), (name, key)
            # the masters have their values back
            assert torch.equal(run["after"][key], run["masters"][-1][key])
        for key, value in run["reference"].items():
            torch.testing.assert_close(
                value, followed(run["masters"], key, warmup=False), atol=1e-7, rtol=3e-7
            )
            torch.testing.assert_close(
                run["shown"][key], value, atol=1e-7, rtol=2**-8 if "16" in name else 0
            )
        if "16" in name:
            assert run["still"] > 0.8  # of the module's own weights
            # each rank has its part alone
            assert sum(of_rank[name]["held"] for of_rank in ranks) < 1.1


def first_moments(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    moments = []
    for stage in (0, 1):
        engine = tiny_engine(stage=stage)
        tiny_step(engine)(tiny_batch(0))
        moments.append(engine.moments(on_host))
    return moments


def test_the_betas_are_the_settings():
    """After one step the moments are (1 - b1) g and (1 - b2) g^2, so m^2 / v is .1^2 / .02."""
    for moments in run_ranks(first_moments, 1)[0]:
        first, second = (
            moments[f"tower.3.weight.{name}"].double()
            for name in ("exp_avg", "exp_avg_sq")
        )
        seen = first.abs() > 1e-6
        assert seen.any()
        torch.testing.assert_close(
            first[seen].square() / second[seen],
            torch.full((int(seen.sum()),), 0.5).double(),
            rtol=1e-4,
            atol=0,
        )
