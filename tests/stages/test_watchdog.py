"""Ranks that are stopped or fail: the others say so, and all of them end."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tower_runs import ROOT, environment, lines, losses, options, wait_for

from llm2clip_plugin.train.distributed import free_port

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else restarted ranks read addresses of those before them
# rank 1 raises in the middle of step 5 once
FAULTS = """
import os, sys
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.train.step import TowerStep
make_loss = TowerStep._loss
first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

def loss(self, encoded, batch, *references):
    if os.environ["RANK"] == "1" and batch["position"] == 16 * 5 and first_life:
        raise RuntimeError("broken")
    return make_loss(self, encoded, batch, *references)

TowerStep._loss = loss
leave(run("train-tower", sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_failed_rank_ends_all_and_the_run_comes_back(tiny: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: rank 1 raises, all end, the run resumes. Then rank 0 is stopped for longer than the
    timeout: all end for good."""
    output, log, script = tmp_path / "run", tmp_path / "log", tmp_path / "faults.py"
    script.write_text(FAULTS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--shutdown_timeout", "5"]
    more = ("--train.straggler-seconds", "2", "--train.ddp-timeout", "15", "--heads.steps", "1", "--max_steps", "4000")
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
        below = [one for one in psutil.Process(process.pid).children(recursive=True) if "python" in one.name()]
        ranks = {rank: one for one in below if (rank := one.environ().get("RANK")) is not None}
        ranks["0"].suspend()
        assert process.wait(timeout=600) != 0
        assert psutil.wait_procs(list(ranks.values()), timeout=60)[1] == []
    finally:
        if process.poll() is None:  # leave no process behind, whatever the test found
            for one in (process, *psutil.Process(process.pid).children(recursive=True)):
                one.kill()
    steps = [line["step"] for line in lines(output) if "loss" in line]
    assert steps == sorted(set(steps))
