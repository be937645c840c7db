"""Two hosts: both launchers train over both; one is killed in mid-step, one rank resumes alone,
then both to the end.

Skipped without root, network namespaces, sshd or pdsh; scripts/test.sh installs the programs where
it may.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_data import make_all
from tiny_llm import save_tiny_llm
from tower_runs import environment, finish, losses, options, start
from two_nodes import Cluster, Node, wait_for, why_not

from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.errors import StoppedError
from llm2clip_plugin.train.checkpoint import TrainState

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

STEPS = 30
# as after `source .venv/bin/activate`; a login by ssh has none of it
LOGIN = environment(
    PATH=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # without it, torchrun does not let a host return
)
PATIENCE = 240  # seconds until a run counts as hanging, on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster") / "hosts") as cluster:
        yield cluster


def launch(node: Node, log: Path, *words: str) -> subprocess.Popen[str]:
    """A command on a host, which writes into ``log``."""
    with log.open("a") as file:
        return node.popen(words, env=LOGIN, stdout=file, stderr=subprocess.STDOUT)


def llm_options(captions: Path, llm: Path, run: Path, *more: str) -> list[str]:
    """A short stage 1 at a rate that moves the loss."""
    return [
        *(
            str(captions),
            "--llm",
            str(llm),
            "--compute-dtype",
            "float32",
            "--output-dir",
            str(run),
            "--lr",
            "3e-3",
        ),
        *(
            "--global-batch",
            "16",
            "--warmup-steps",
            "0",
            "--dropout",
            "0",
            "--scale",
            "20",
            *more,
        ),
    ]


def write_captions(path: Path) -> Path:
    """48 samples with two captions each."""
    words = (
        "red bicycle leans against the brick wall of an old "
        "house near two sleeping dogs"
    ).split()
    names = [f"{words[i % 14]} {words[i * 5 % 14]} {i}" for i in range(48)]
    rows = [
        {
            "id": name,
            "image": "x.png",
            "caption": name,
            "long_caption": f"here is a {name}",
        }
        for name in names
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def reaches(run: Path, step: int, process: subprocess.Popen[str], log: Path) -> None:
    """Wait until the run has a line for ``step``."""
    wait_for(
        lambda: max(losses(run), default=0) >= step or process.poll() is not None,
        PATIENCE,
    )
    assert process.poll() is None, log.read_text()[-3000:]


def test_a_tower_over_pdsh(cluster: Cluster, tmp_path: Path):
    """ZeRO-2. A fp32 sum over other numbers of ranks: 1e-5."""
    node_1, node_2 = cluster.nodes
    tiny = make_all(tmp_path / "tiny")
    straight = tmp_path / "straight"
    run = tmp_path / "run"
    log = tmp_path / "log"
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    more = ("--max_steps", str(STEPS), "--deepspeed", "scripts/zero2.json")
    assert finish(start(options(tiny, straight, *more), 2)) == [0, 0]
    launcher = ("deepspeed", "--hostfile", str(tmp_path / "hosts"))
    command = ("scripts/train_tower.py", *options(tiny, run, *more))

    both = launch(node_1, log, *launcher, *command)
    reaches(run, 6, both, log)
    node_2.kill()
    assert both.wait(PATIENCE) != 0
    assert (
        "error: rank 0 on node-1 lost the connection to another rank: "
        in log.read_text()
    )
    assert "Traceback" not in log.read_text()

    (alone,) = start(options(tiny, run, *more), 1)
    wait_for(lambda: max(losses(run)) >= 14 or alone.poll() is not None, PATIENCE)
    os.kill(alone.pid or 0, signal.SIGTERM)
    assert alone.wait(PATIENCE) == StoppedError.status, alone.output
    stopped = RunRecord.read(run / RunRecord.FILE)
    assert 14 <= stopped.step < STEPS

    node_2.start()
    both = launch(node_2, log, *launcher, *command)  # whichever host the command is on
    assert both.wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    worlds = {
        state.step: state.world_size
        for state in map(TrainState.read, run.glob("checkpoints/*/state.json"))
    }
    assert worlds[STEPS] == 2
    assert RunRecord.read(run / RunRecord.FILE).finished


def test_torchrun_goes_on_by_itself(cluster: Cluster, tmp_path: Path):
    """Stage 1 with ZeRO-1: node-1 is left alone, restarts with one rank, and takes node-2 in when
    it is back."""
    node_1, node_2 = cluster.nodes
    captions = write_captions(tmp_path / "captions.jsonl")
    straight = tmp_path / "straight"
    run = tmp_path / "run"
    more = (
        "--max-steps",
        str(STEPS),
        "--save-steps",
        "2",
        "--deepspeed",
        "scripts/zero1.json",
    )
    llm = save_tiny_llm(tmp_path / "llm", "llama")
    script = "scripts/finetune_llm.py"
    assert finish(start(llm_options(captions, llm, straight, *more), 2, script)) == [
        0,
        0,
    ]
    agents = (
        "torchrun",
        "--nnodes",
        "1:2",
        "--nproc_per_node",
        "1",
        "--max-restarts",
        "3",
        "--rdzv_backend",
        "c10d",
    )
    agents += ("--rdzv_endpoint", "node-1:29400", "--rdzv_id", "1", "--rdzv_conf")
    agents += (
        "last_call_timeout=1,keep_alive_interval=1",
        script,
        *llm_options(captions, llm, run, *more),
    )
    first = tmp_path / "first.log"
    second = tmp_path / "second.log"

    survivor = launch(node_1, first, *agents)
    launch(node_2, second, *agents)
    reaches(run, 5, survivor, first)
    node_2.kill()
    reached = max(losses(run))
    reaches(run, reached + 5, survivor, first)
    assert "lost the connection to another rank: " in first.read_text()
    # it would be at its end before node-2 is back
    node_1.check("pkill", "-STOP", "-f", f"python -u {script}")
    # one already if node-2 was late at the start
    closed = first.read_text().count("closing signal SIGTERM")
    node_2.start()
    returned = launch(node_2, second, *agents)
    wait_for(
        lambda: first.read_text().count("closing signal SIGTERM") > closed, PATIENCE
    )
    node_1.check("pkill", "-CONT", "-f", f"python -u {script}")
    assert survivor.wait(PATIENCE) == 0, first.read_text()[-3000:]
    assert returned.wait(PATIENCE) == 0, first.read_text()[-3000:]
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert re.search(rf"SIGTERM: saved step \d+ of {STEPS}", first.read_text())
    (last,) = run.glob(f"checkpoints/step-{STEPS:08d}")
    assert TrainState.read(last / TrainState.FILE).world_size == 2
    assert (run / "adapter").is_dir()
