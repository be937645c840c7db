"""Ranks that are stopped or fail: the others say so, and all of them end."""

import json
import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest
from forked_python import programs
from tower_runs import ROOT, environment, lines, losses, options, processes_of, wait_for

from llm2clip_plugin.train.distributed import free_port

# else restarted ranks read addresses of those before them
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# rank 1 raises in the middle of step 5 once; seconds in which ranks may end by themselves are few
FAULTS = """
import os, sys
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.train import guard
from llm2clip_plugin.train.step import TowerStep
guard.GRACE, make_loss = 3.0, TowerStep._loss
first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

def loss(self, encoded, batch, *references):
    if os.environ["RANK"] == "1" and batch["position"] == 16 * 5 and first_life:
        raise RuntimeError("broken")
    return make_loss(self, encoded, batch, *references)

TowerStep._loss = loss
print(f"process of rank {os.environ['RANK']}: {os.getpid()}\\n", end="", flush=True)
leave(run("train-tower", sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_failed_rank_ends_all_and_the_run_comes_back(
    tiny: Path, tmp_path: Path
) -> None:
    """torchrun --max-restarts: rank 1 raises, all end, the run resumes. Rank 1 is suspended until
    rank 0 reports it, then rank 0 until rank 1 ends after the timeout: all end for good."""
    output = tmp_path / "run"
    log = tmp_path / "log"
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    launcher = [
        str(programs() / "python"),
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
    ]
    launcher += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"localhost:{free_port()}",
        "--max_restarts",
        "1",
    ]
    more = (
        "--train.straggler-seconds",
        "2",
        "--train.ddp-timeout",
        "15",
        "--heads.steps",
        "1",
        "--max_steps",
        "4000",
    )
    command = [*launcher, str(script), *options(tiny, output, *more)]
    streams = {"stdout": log.open("w"), "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**OWN_STORE), **streams
    )

    def said() -> str:
        return log.read_text(errors="replace")

    try:
        wait_for(lambda: len(losses(output)) > 8 or process.poll() is not None)
        assert (
            f"rank 1 on {os.uname().nodename} failed in phase forward and backward of "
            "step 5: Runtime"
        ) in said()
        rank = psutil.Process(json.loads((output / "run.lock").read_text())["pid"])
        other = psutil.Process(int(re.findall(r"process of rank 1: (\d+)", said())[-1]))
        other.suspend()
        wait_for(
            lambda: (
                f"silent: rank 1 ({os.uname().nodename}, pid {other.pid}) for" in said()
            )
        )
        other.resume()
        closed = said().count("closing signal SIGTERM")
        rank.suspend()
        # rank 1 has ended
        wait_for(lambda: said().count("closing signal SIGTERM") > closed)
        rank.resume()
        assert process.wait(timeout=600) != 0
        assert psutil.wait_procs([rank], timeout=60)[1] == []
    finally:
        for left_over in processes_of(
            output
        ):  # leave none behind, whatever the test found
            left_over.kill()
    steps = [line["step"] for line in lines(output) if "loss" in line]
    assert steps == sorted(set(steps))
