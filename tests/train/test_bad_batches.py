"""Batches with a non-finite loss or gradient: left out alike on all ranks and after a resume, or
the end of the run."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from train_helpers import (
    allow_fp16,
    new_state,
    newest,
    parts_of,
    run_ranks,
    tiny_batch,
    tiny_engine,
    tiny_step,
)

from llm2clip_plugin.errors import NonFiniteLossError
from llm2clip_plugin.run_folder import LEFT_OUT
from llm2clip_plugin.train.checkpoint import (
    AVERAGES,
    MODEL,
    OPTIMIZER,
    Checkpoints,
    load,
    on_host,
)
from llm2clip_plugin.train.config import OptimConfig
from llm2clip_plugin.train.loop import run_loop

# the seventh batch has a NaN on the last rank
STEPS = 8
BAD = 7
WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0, "micro": 16},
    "zero1": {"stage": 1, "micro": 16},
    "bf16 zero1 cached": {"stage": 1, "micro": 4, "precision": "bf16"},
    "bf16 zero2 cached": {"stage": 2, "micro": 4, "precision": "bf16"},
    "zero2 offload": {"stage": 2, "micro": 4, "offload": True},
    "zero3 cached": {"stage": 3, "micro": 4},
}


def batches(
    start: int, rank: int, world: int, bad: tuple[int, ...] = (BAD,)
) -> Iterator[dict[str, Any]]:
    for i in range(start, STEPS):
        batch = tiny_batch(i, rank=rank, world=world)
        if i + 1 in bad and rank == world - 1:
            batch["pixels"][5, 0, 0, 0] = math.nan
        yield batch


def train(
    rank: int, world: int, run: Path, way: dict[str, Any], *, allowed: int, **more: Any
) -> dict[str, Any]:
    """Start or resume a run; what it ends with."""
    bad = more.pop("bad", (BAD,))
    engine, state, average = newest(run, world, **way)
    stream = batches(state.step, rank, world, bad)
    settings = {"skip_bad_batches": allowed, "save_total_limit": 0}
    try:
        more |= {
            "averages": {AVERAGES: average},
            "checkpoints": Checkpoints(run, keep=0),
        }
        # the same whatever the number of steps
        more["optim"] = OptimConfig(lr=0.01, schedule="constant")
        state = run_loop(parts_of(run, engine, state, stream, train=settings, **more))
    except NonFiniteLossError as error:
        return {"error": str(error), "status": error.status}
    ended = {
        "bad": state.bad_batches,
        "samples": state.samples,
        "updates": engine.updates,
    }
    return {**ended, "weights": engine.weights(on_host)}


def left_out(rank: int, world: int, folder: str) -> dict[str, dict[str, Any]]:
    """Each way: to its end, as one run and as three; then one with fewer allowed than there are."""
    results = {}
    for name, way in WAYS.items():
        run = Path(folder) / name / "whole"
        parts = Path(folder) / name / "parts"
        whole = train(rank, world, run, way, allowed=1)
        for steps in (BAD - 1, BAD, STEPS):  # stops before and after the bad batch
            last = train(rank, world, parts, way, allowed=1, total_steps=steps)
        results[name] = {"whole": whole, "parts": last}
    results["refused"] = train(
        rank, world, Path(folder) / "refused", WAYS["zero0"], allowed=0
    )
    results["again"] = train(
        rank,
        world,
        Path(folder) / "again",
        WAYS["zero3 cached"],
        allowed=1,
        bad=(3, BAD),
    )
    return results


def test_a_nan_in_batch_7_is_left_out_on_two_ranks_and_after_a_resume(tmp_path: Path):
    both = run_ranks(left_out, 2, str(tmp_path))
    for name in ("refused", "again"):  # none is allowed; the second of two
        run = both[0].pop(name)
        assert run["status"] == 3, name
        assert f"sample {32 * BAD} " in run["error"], name
    for name, run in both[0].items():
        whole = run["whole"]
        parts = run["parts"]
        assert [(bad["step"], bad["samples"]) for bad in whole["bad"]] == [
            (BAD, 32 * BAD)
        ], name
        assert "rank 1: sample-" in whole["bad"][0]["reason"]
        assert "rank 0" not in whole["bad"][0]["reason"]
        assert parts["bad"] == whole["bad"] == both[1][name]["whole"]["bad"]
        assert whole["samples"] == 32 * STEPS
        assert whole["updates"] == STEPS - 1
        for key, value in whole["weights"].items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, both[1][name]["whole"]["weights"].get(key, value))
            # no bad gradient is left to the step after it
            assert torch.equal(value, parts["weights"][key]), name
        before, after = (
            load(tmp_path / name / f"parts/checkpoints/step-{s:08d}").state
            for s in (BAD - 1, BAD)
        )
        assert before.updates == after.updates == BAD - 1
        # SHA-256
        assert all(
            before.files[file] == after.files[file] for file in (MODEL, OPTIMIZER)
        ), name
        lines = [
            json.loads(line)
            for line in (tmp_path / name / "whole/metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        assert [
            (line["step"], line["samples"])
            for line in lines
            if line.get("event") == LEFT_OUT
        ] == [(BAD, 32 * BAD)]
        assert [line["step"] for line in lines if "loss" in line] == [
            1,
            2,
            3,
            4,
            5,
            6,
            8,
        ]


def steep(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The gradient of batch 3 is not finite, its loss is; the loss of batch 5 is not on a rank, its
    gradient is."""
    results = {}
    for name, way in WAYS.items():
        engine = tiny_engine(world=world, **way)
        step = tiny_step(engine)

        def late(features: Any) -> torch.Tensor:
            if features.progress == 0.5:
                return (0 * features.anchor_bD).sum().sqrt()
            return torch.tensor(math.inf if rank and features.progress == 1 else 0.0)

        step.terms = {**step.terms, "late": late}
        run = Path(folder) / name
        stream = batches(0, rank, world, bad=())
        settings = {"skip_bad_batches": 2}
        state = run_loop(
            parts_of(run, engine, new_state(), stream, step=step, train=settings)
        )
        results[name] = {
            "bad": state.bad_batches,
            "updates": engine.updates,
            "weights": engine.weights(on_host),
        }
    return results


def test_a_non_finite_gradient_is_left_out_before_the_update(tmp_path: Path):
    for name, run in run_ranks(steep, 2, str(tmp_path))[0].items():
        assert [bad["step"] for bad in run["bad"]] == [3, 5], name
        assert "gradient" in run["bad"][0]["reason"], name
        assert run["updates"] == STEPS - 2
        assert all(torch.isfinite(value).all() for value in run["weights"].values())


def overflow(rank: int, world: int, folder: str) -> dict[str, Any]:
    """fp16: pixels of 6e4 overflow in the first layer of batches 3 and 4, then of all."""
    allow_fp16()
    results: dict[str, Any] = {}
    for name, bad in (("once", (3, 4)), ("always", tuple(range(3, STEPS + 1)))):
        engine = tiny_engine(stage=2, precision="fp16", micro=4, world=world)
        scaler = engine._scaler
        scaler.cur_scale = scaler.min_scale * 4 if name == "always" else 256.0

        def stream(bad: tuple[int, ...] = bad) -> Iterator[dict[str, Any]]:
            for i in range(STEPS):
                batch = tiny_batch(i, rank=rank, world=world)
                if i + 1 in bad and rank == 1:
                    batch["pixels"][:4] = 6e4 * batch["pixels"][:4].sign()
                yield batch

        try:
            parts = parts_of(
                Path(folder) / name,
                engine,
                new_state(),
                stream(),
                train={"precision": "fp16"},
            )
            run_loop(parts)
            error = ""
        except NonFiniteLossError as caught:
            error = str(caught)
        results[name] = {
            "error": error,
            "updates": engine.updates,
            "scale": scaler.cur_scale,
        }
    return results


def test_fp16_lowers_its_loss_scale_after_an_overflow_in_the_forward_pass(
    tmp_path: Path,
):
    """The first of them uses up DeepSpeed's hysteresis, the second halves the scale; at the minimum
    the run ends."""
    result = run_ranks(overflow, 2, str(tmp_path))[0]
    assert result["once"] == {"error": "", "updates": STEPS - 2, "scale": 128.0}
    assert "the loss is not finite" in result["always"]["error"]
    assert "rank 1: sample-" in result["always"]["error"]
    assert result["always"]["scale"] == 1.0
    assert result["always"]["updates"] == 2
    lines = [
        json.loads(line)
        for line in (tmp_path / "once/metrics.jsonl").read_text().splitlines()
    ]
    assert [
        line["step"] for line in lines if "skipped" in line and "loss" not in line
    ] == [3, 4]
    assert all(
        math.isfinite(value)
        for line in lines
        for value in line.values()
        if isinstance(value, float)
    )
