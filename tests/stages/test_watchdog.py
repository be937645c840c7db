"""Ranks that are stopped or fail: the others say so, and all of them end."""

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest
from forked_python import programs
from tower_runs import ROOT, environment, lines, losses, options, wait_for

from llm2clip_plugin.train.distributed import free_port

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else restarted ranks read addresses of those before them
# rank 1 raises in the middle of step 5 once; no rank waits long for the store of one that is stopped
FAULTS = """
import os, sys
from datetime import timedelta
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.train.guard import Watch
from llm2clip_plugin.train.step import TowerStep
enter_watch, make_loss = Watch.__enter__, TowerStep._loss
first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

def loss(self, encoded, batch, *references):
    if os.environ["RANK"] == "1" and batch["position"] == 16 * 5 and first_life:
        raise RuntimeError("broken")
    return make_loss(self, encoded, batch, *references)

def impatient(watch):
    enter_watch(watch)
    watch.store.set_timeout(timedelta(seconds=2))

Watch.__enter__, TowerStep._loss = impatient, loss
leave(run("train-tower", sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_failed_rank_ends_all_and_the_run_comes_back(tiny: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: rank 1 raises, all end, the run resumes. Then rank 0 is stopped for longer than the
    timeout: all end for good."""
    output, log, script = tmp_path / "run", tmp_path / "log", tmp_path / "faults.py"
    script.write_text(FAULTS)
    launcher = [str(programs() / "python"), "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"]
    launcher += ["--max_restarts", "1", "--shutdown_timeout", "2"]
    more = ("--train.straggler-seconds", "2", "--train.ddp-timeout", "10", "--heads.steps", "1", "--max_steps", "4000")
    process = subprocess.Popen(
        [*launcher, str(script), *options(tiny, output, *more)],
        cwd=ROOT,
        env=environment(**OWN_STORE),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )

    def said() -> str:
        return log.read_text(errors="replace")

    try:
        wait_for(lambda: len(losses(output)) > 8 or process.poll() is not None)
        assert f"rank 1 on {os.uname().nodename} failed in phase forward and backward of step 5: Runtime" in said()
        rank = psutil.Process(json.loads((output / "run.lock").read_text())["pid"])
        rank.suspend()
        assert process.wait(timeout=600) != 0
        assert psutil.wait_procs([rank], timeout=60)[1] == []
    finally:
        process.kill()
    steps = [line["step"] for line in lines(output) if "loss" in line]
    assert steps == sorted(set(steps))
