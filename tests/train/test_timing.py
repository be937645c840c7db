"""Time of a step by phase."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tower_runs import lines
from train_helpers import new_state, parts_of, run_ranks, tiny_batch, tiny_engine

from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.distributed import PHASES
from llm2clip_plugin.train.loop import run_loop

RUNS = {
    "zero0": (0, 16),
    "zero1 cached": (1, 4),
    "zero2": (2, 16),
    "zero3 cached": (3, 8),
}
SHORT = {"short": (0, 16)}  # fewer steps than the profiler leaves out otherwise
STEPS = 12


def train(rank: int, world: int, folder: str) -> None:
    for name, (stage, micro) in (RUNS | SHORT).items():
        engine = tiny_engine(stage=stage, micro=micro, world=world)
        batches = (tiny_batch(i, rank=rank, world=world) for i in range(STEPS))
        steps = 3 if name == "short" else STEPS
        parts = parts_of(
            Path(folder) / name, engine, new_state(), batches, total_steps=steps
        )
        profile = 2 if name in ("zero0", "zero2", "short") else 0
        if name == "zero2":  # a trace that cannot be written ends no run
            (Path(folder) / name).mkdir(exist_ok=True)
            (Path(folder) / name / "profile").touch()
        run_loop(
            replace(
                parts,
                train=TrainConfig(
                    global_batch=32, save_minutes=0, profile_steps=profile
                ),
            )
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("timing")
    run_ranks(train, 2, str(folder))
    for name, first in (("zero0", 5), ("short", 1)):
        (trace,) = (folder / name / "profile").glob("*-rank0.*.pt.trace.json")
        names = {
            str(event.get("name"))
            for event in json.loads(trace.read_text())["traceEvents"]
        }
        traced = {event for event in names if event.startswith("ProfilerStep")}
        assert traced == {f"ProfilerStep#{first}", f"ProfilerStep#{first + 1}"}
    losses = {}
    for name in RUNS:
        losses[name] = [line for line in lines(folder / name) if "loss" in line]
    return losses


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_says_where_its_time_went(
    runs: dict[str, list[dict[str, Any]]], name: str
):
    """Two ranks under each ZeRO stage."""
    assert [line["step"] for line in runs[name]] == list(range(1, STEPS + 1))
    assert all(
        {"step_seconds", "samples_per_second", "wait_share"} <= line.keys()
        for line in runs[name]
    )
    compared = [line for line in runs[name] if "slowest_rank" in line]
    # a collective every ten steps, and at the end
    assert [line["step"] for line in compared] == [10, STEPS]
    for line in compared:
        phases = [line[f"{phase}_seconds"] for phase in PHASES]
        assert min(phases) > 0
        assert line["step_seconds_min"] <= sum(phases) + 1e-6
        assert sum(phases) <= line["step_seconds_max"] + 1e-6
    assert compared[-1]["slowest_host"] == socket.gethostname()
    assert compared[-1]["data_seconds_max"] > compared[-1]["data_seconds_min"]
