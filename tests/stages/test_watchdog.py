"""Ranks that are late, stopped or fail: the others say so, and all of them end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny_data import make_all
from tower_runs import ROOT, environment, lines, losses, options

from llm2clip_plugin.train.distributed import free_port
from llm2clip_plugin.train.errors import StoppedError

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else restarted ranks read addresses of those before them
# rank 1 is slow with its data once, and raises in the middle of a step once
FAULTS = """
import os, sys, time
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.stages.run import TrainingRun
from llm2clip_plugin.train.step import TowerStep
train_to_end, make_loss = TrainingRun.train_to_end, TowerStep._loss
slow_at, fail_at = int(os.environ["SLOW_AT"]), int(os.environ["FAIL_AT"])
first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

def slow(batches):
    for batch in batches:
        if os.environ["RANK"] == "1" and batch["position"] == 16 * slow_at:
            time.sleep(6)
        yield batch

def loss(self, encoded, batch, *references):
    if os.environ["RANK"] == "1" and batch["position"] == 16 * fail_at and first_life:
        raise RuntimeError(f"broken at {time.time()}")
    return make_loss(self, encoded, batch, *references)

TowerStep._loss = loss
TrainingRun.train_to_end = lambda self, *a, batches, **o: train_to_end(self, *a, batches=slow(batches), **o)
leave(run("train-tower", sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_all(tmp_path_factory.mktemp("tiny"))
    (folder / "faults.py").write_text(FAULTS)
    return folder


class Run:
    """A launcher with two ranks; its output goes to a file."""

    def __init__(self, launcher: list[str], argv: list[str], log: Path, **variables: str) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [*launcher, *argv],
            cwd=ROOT,
            env=environment(**variables),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not ready():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Leave no process behind, whatever the test found."""
        if self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            for process in (self.process, *below):
                process.kill()

    def ranks(self) -> dict[str, psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        with_rank = {process.environ().get("RANK"): process for process in below if "python" in process.name()}
        return {rank: process for rank, process in with_rank.items() if rank is not None}


@pytest.mark.slow
def test_late_ranks_are_named_and_come_back(tiny: Path, tmp_path: Path) -> None:
    """Slow data, with its stack; SIGSTOP and SIGCONT; then the run ends as if nothing had been."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    more = ("--train.straggler-seconds", "2", "--heads.steps", "1", "--max_steps", "400", "--train.save-steps", "0")
    argv = [str(tiny / "faults.py"), *options(tiny, tmp_path / "run", *more)]
    run = Run(launcher, argv, tmp_path / "log", SLOW_AT="3", FAIL_AT="0")
    try:
        run.wait_for(lambda: len(losses(tmp_path / "run")) > 4)
        assert "has been in phase data of step 3 for" in run.said
        assert "rank 1 is in phase data of step 3; its main thread:" in run.said and "time.sleep(6)" in run.said
        stopped = run.ranks()["1"]
        stopped.suspend()
        run.wait_for(lambda: f"pid {stopped.pid}) has sent no sign of life for" in run.said)
        stopped.resume()
        run.wait_for(lambda: "is back after" in run.said)
        for rank in run.ranks().values():
            rank.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=600) == StoppedError.status, run.said
    finally:
        run.end()
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_failed_rank_ends_all_and_the_run_comes_back(tiny: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: rank 1 raises, all end, the run resumes. Then rank 0 is stopped for longer than the
    timeout: all end for good."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--shutdown_timeout", "5"]
    more = ("--train.straggler-seconds", "2", "--train.ddp-timeout", "15", "--heads.steps", "1", "--max_steps", "4000")
    argv = [str(tiny / "faults.py"), *options(tiny, tmp_path / "run", *more)]
    run = Run(launcher, argv, tmp_path / "log", SLOW_AT="0", FAIL_AT="5", **OWN_STORE)
    try:
        run.wait_for(lambda: len(losses(tmp_path / "run")) > 8)
        assert f"rank 1 on {os.uname().nodename} failed in phase forward and backward of step 5: Runtime" in run.said
        ranks = run.ranks()
        ranks["0"].suspend()
        run.wait_for(lambda: f"late: rank 0 ({os.uname().nodename}, pid {ranks['0'].pid}) has sent no sign" in run.said)
        assert run.process.wait(timeout=600) != 0
        assert psutil.wait_procs(list(ranks.values()), timeout=60)[1] == []
    finally:
        run.end()
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == sorted(set(steps))
