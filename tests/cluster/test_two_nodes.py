"""Two hosts: both launchers train over both; one is killed in mid-step, the other resumes alone, then both to the end.

Skipped without root, network namespaces, sshd or pdsh; scripts/test.sh installs the programs where it may.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_data import make_all
from tower_runs import environment, finish, losses, options, start
from two_nodes import Cluster, Node, wait_for, why_not

from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.train.checkpoint import TrainState

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

STEPS = 30
# as after `source .venv/bin/activate`; a login by ssh has none of it
LOGIN = environment(PATH=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
PATIENCE = 240  # seconds until a run counts as hanging, on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster") / "hosts") as cluster:
        yield cluster


def launch(node: Node, log: Path, *words: str) -> subprocess.Popen[str]:
    """A command on a host, which writes into ``log``."""
    with log.open("a") as file:
        return node.popen(words, env=LOGIN, stdout=file, stderr=subprocess.STDOUT)


def reaches(run: Path, step: int, process: subprocess.Popen[str], log: Path) -> None:
    """Wait until the run has a line for ``step``."""
    wait_for(lambda: max(losses(run), default=0) >= step or process.poll() is not None, PATIENCE)
    assert process.poll() is None, log.read_text()[-3000:]


def test_a_tower_over_pdsh(cluster: Cluster, tmp_path: Path):
    """ZeRO-2. A fp32 sum over other numbers of ranks: 1e-5."""
    one, two = cluster.nodes
    tiny, straight, run, log = make_all(tmp_path / "tiny"), tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    more = ("--max_steps", str(STEPS), "--deepspeed", "scripts/zero2.json")
    assert finish(start(options(tiny, straight, *more), 2)) == [0, 0]
    launcher = ("deepspeed", "--hostfile", str(tmp_path / "hosts"))
    command = ("scripts/train_tower.py", *options(tiny, run, *more))

    both = launch(one, log, *launcher, *command)
    reaches(run, 6, both, log)
    two.kill()
    assert both.wait(PATIENCE) != 0
    assert "error: rank 0 on node-1 lost the connection to another rank: " in log.read_text()
    assert "Traceback" not in log.read_text()

    alone = launch(one, log, *launcher, "--include", "node-1", *command)
    reaches(run, 14, alone, log)
    one.check("pkill", "-TERM", "-f", "train_tower.py --local_rank")
    assert alone.wait(PATIENCE) == 0, log.read_text()[-3000:]
    stopped = RunRecord.read(run / RunRecord.FILE)
    assert 14 <= stopped.step < STEPS

    two.start()
    both = launch(two, log, *launcher, *command)  # whichever host the command is on
    assert both.wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5) and sorted(losses(run)) == list(range(1, STEPS + 1))
    worlds = {state.step: state.world_size for state in map(TrainState.read, run.glob("checkpoints/*/state.json"))}
    assert worlds[STEPS] == 2 and RunRecord.read(run / RunRecord.FILE).finished


KILLED = """
import os, signal, sys
from pathlib import Path
from two_nodes import Cluster

with Cluster(Path(sys.argv[1])) as cluster:
    for node in cluster.nodes:
        node.popen(["sleep", "987654"])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_a_killed_test(tmp_path: Path):
    """Otherwise hosts would pile up on a developer's machine."""
    helper = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "hosts")], cwd=Path(__file__).parent, check=False
    )
    assert helper.returncode == -9

    def left() -> bool:
        return (
            subprocess.run(["pgrep", "-f", f"{tmp_path}|sleep 987654"], capture_output=True, check=False).returncode
            == 0
        )

    wait_for(lambda: not left(), 30)
