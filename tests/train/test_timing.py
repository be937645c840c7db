"""Time of a step by phase, FLOPs and MFU, ranks compared, and how monitors call the values."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tower_runs import lines
from train_helpers import new_state, parts_of, run_ranks, tiny_batch, tiny_engine

from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.loop import run_loop
from llm2clip_plugin.train.reports import Progress, count_model_flops, peak_of, repeated
from llm2clip_plugin.train.timing import PHASES, HostClock, StepTimer, compare_ranks, timed


class Ticks(HostClock):
    """A mark a second; the device has passed those up to ``reached``."""

    def __init__(self) -> None:
        self.now, self.reached = 0, 1000

    def mark(self) -> int:
        self.now += 1
        return self.now

    def passed(self, mark: int, *, wait: bool) -> bool:
        self.reached = max(self.reached, mark) if wait else self.reached
        return mark <= self.reached

    def seconds(self, start: int, end: int) -> float:
        assert max(start, end) <= self.reached
        return float(end - start)


def one_step(timer: StepTimer) -> None:
    timer.start()
    timer.switch("forward")
    with timed("communication"), timed("communication"):
        pass
    with timed("backward"), timed("communication"):  # a gather inside the backward pass
        pass
    with timed("optimizer"):
        pass
    timer.stop()


def test_each_moment_of_a_step_belongs_to_one_phase():
    clock = Ticks()
    with StepTimer(clock) as timer:
        before = timer.totals()
        with timed("communication"):  # between steps nothing is measured
            pass
        one_step(timer)
        mean = timer.totals().mean_since(before)
        phases = {name: mean[f"{name}"] for name in PHASES}
        assert phases == {"data": 1, "forward": 4, "backward": 2, "optimizer": 1, "communication": 2}
        assert sum(phases.values()) == clock.now - 1
    one_step(StepTimer(clock))  # not the active one
    assert timer.totals().steps == 1


def test_a_step_is_reported_when_the_device_has_finished_it():
    clock = Ticks()
    with StepTimer(clock) as timer:
        one_step(timer)
        clock.reached = clock.now
        one_step(timer)
        first = timer.totals()
        assert first.steps == 1 and not timer.totals().mean_since(first)
        both = timer.totals(wait=True)
        assert both.steps == 2 and both.mean_since(first)["forward"] == 4


def test_flops_are_those_of_the_model():
    """A linear layer and attention: counted once, whatever is computed again for checkpointing or caching."""
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(2, 4, 5, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) + x @ weight

    with count_model_flops() as plain:
        block(x).sum().backward()
    linear, attention = 2 * (2 * 4 * 5) * 8 * 8, 2 * 2 * (2 * 4) * 5 * 5 * 8
    # two products each in the backward pass, and one more in flash attention's, which computes the scores again
    assert plain == {torch.float32: 3 * linear + attention + attention * 5 // 2}
    with count_model_flops() as again:
        with torch.no_grad(), repeated():
            block(x)
        checkpoint(block, x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
    assert again == plain
    with count_model_flops() as half, torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert half[torch.bfloat16] == linear + attention


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("Tesla V100-SXM2-32GB", torch.float32, True, 15.7e12),  # it has no TF32
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, False, None),
        ("NVIDIA Next 9000", torch.bfloat16, False, None),
    ],
)
def test_peaks_by_name(name: str, dtype: torch.dtype, tf32: bool, expected: float | None):
    assert peak_of(name, dtype, tf32=tf32) == (expected and pytest.approx(expected))


def test_the_slowest_rank_is_the_one_that_waits_least_for_the_others():
    ranks = [(1.0, 0.1, 0.5), (1.0, 0.6, 0.0), (1.0, 0.2, 0.4)]  # seconds of the step, of data, of communication
    values = compare_ranks(ranks, ["node-1", "node-2", "node-2"])
    assert values["slowest_rank"] == 1 and values["slowest_host"] == "node-2"
    assert (values["data_seconds_min"], values["data_seconds_max"]) == (0.1, 0.6)
    assert (values["busy_seconds_min"], values["busy_seconds_max"]) == (0.5, 1.0)
    bar = Progress(1, start=0, show=False)
    bar.values |= values | {"mfu": 0.412, "tflops": 3.0, "wait_share": 0.6}
    assert bar.description() == "0 samples/s  MFU 41.2 %  waiting for data 60 %  slow: rank 1 (node-2)"
    del bar.values["mfu"]
    assert "3 TFLOP/s" in bar.description()


RUNS = {"zero0": (0, 16), "zero1 cached": (1, 4), "zero2": (2, 16), "zero3 cached": (3, 8)}
STEPS = 12


def train(rank: int, world: int, folder: str) -> None:
    def run(name: str, stage: int, micro: int, steps: int, **settings: Any) -> None:
        engine = tiny_engine(stage=stage, micro=micro, world=world)
        batches = (tiny_batch(i, rank=rank, world=world) for i in range(steps))
        parts = parts_of(Path(folder) / name, engine, new_state(), batches, queue=lambda: (0.5, 3.0), total_steps=steps)
        run_loop(replace(parts, train=TrainConfig(global_batch=32, save_minutes=0, **settings)))

    for name, (stage, micro) in RUNS.items():
        run(name, stage, micro, STEPS, **({"profile_steps": 2, "profile_all_ranks": True} if name == "zero0" else {}))
    run("short", 0, 16, 3, profile_steps=9)  # fewer steps than are to be traced


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timing")
    run_ranks(train, 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [line for line in lines(folder / name) if "loss" in line] for name in RUNS}


def traced_steps(folder: Path, rank: int) -> set[str]:
    """The steps in the one trace of a rank, and the rows of its table."""
    (trace,) = folder.glob(f"*-rank{rank}.*.pt.trace.json")
    table = (folder / f"operators-rank{rank}.txt").read_text()
    assert "Self CPU" in table and len([row for row in table.splitlines() if "us " in row or "ms " in row]) == 10
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    return {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")}


def test_a_profile_is_a_trace_of_some_steps_and_a_table(folder: Path):
    for rank in (0, 1):
        assert traced_steps(folder / "zero0/profile", rank) == {"ProfilerStep#5", "ProfilerStep#6"}
    assert traced_steps(folder / "short/profile", 0) == {f"ProfilerStep#{i}" for i in range(3)}
    assert not list((folder / "short/profile").glob("*rank1*"))
    assert not (folder / "zero2/profile").exists()


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_says_where_its_time_went(runs: dict[str, list[dict[str, Any]]], name: str):
    """Two ranks under each ZeRO stage."""
    assert [line["step"] for line in runs[name]] == list(range(1, STEPS + 1))
    for line in runs[name]:
        assert min(line[f"{phase}_seconds"] for phase in PHASES) > 0
        assert line["tflops"] > 0 and "mfu" not in line
        assert (line["loader_ready"], line["loader_capacity"]) == (0.5, 3.0)
        assert {"samples_per_second", "wait_share"} <= line.keys()
    compared = [line for line in runs[name] if "slowest_rank" in line]
    assert [line["step"] for line in compared] == [10, STEPS]  # a collective every ten steps, and at the end
    assert compared[-1]["slowest_host"] == socket.gethostname()
    assert compared[-1]["data_seconds_max"] > compared[-1]["data_seconds_min"]


def test_flops_do_not_depend_on_caching_or_zero(runs: dict[str, list[dict[str, Any]]]):
    counts = [runs[name][-1]["tflops"] * runs[name][-1]["step_seconds"] for name in RUNS]
    assert counts == pytest.approx([counts[0]] * len(RUNS), rel=1e-6)
