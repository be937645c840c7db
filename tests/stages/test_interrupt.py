"""Before the first step: signals while a rank waits for another, and ranks that are given different
things."""

import os
import signal
import socket
from pathlib import Path

import pytest
from forked import Script
from tiny_data import make_all
from tower_runs import ROOT, environment, finish, options, start, wait_for

from llm2clip_plugin.train.distributed import free_port


@pytest.mark.parametrize(
    ("rank", "number", "says"),
    [(0, signal.SIGINT, "interrupted\n"), (1, signal.SIGHUP, "")],
)
def test_a_rank_that_waits_ends_in_a_line(
    tiny: Path, tmp_path: Path, rank: int, number: int, says: str
) -> None:
    """In torch's C++, which prints its stack at a signal and goes on: rank 0 waits for rank 1, rank
    1 for an answer."""
    port = free_port()
    ranks = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with socket.socket() as other:
        if rank == 1:  # a rank 0 that listens and never answers
            other.bind(("127.0.0.1", port))
            other.listen()
        argv = options(tiny, tmp_path / "run")
        script = Script(
            ROOT / "scripts/train_tower.py", argv, environment(**ranks, **address), ROOT
        )
        try:
            if rank == 1:
                other.settimeout(300)
                _connection, _ = other.accept()  # kept open
            else:
                wait_for(lambda: other.connect_ex(("127.0.0.1", port)) == 0, [script])
            os.kill(script.pid or 0, number)
            assert script.wait(timeout=60) == 128 + number
        finally:
            script.kill()
    assert script.output == says
    assert not (tmp_path / "run").exists()


# every rank in a folder of its own, as with an output_dir on a node's own disk; rank 1 also has
# other settings
APART = """
import os, sys
from pathlib import Path
from llm2clip_plugin.cli import leave, run
rank = os.environ["RANK"]
Path(rank).mkdir()
os.chdir(rank)
words = sys.argv[1:]
if rank == "1":
    words += ["--optim.lr", "1e-3", "--deepspeed", ""]
leave(run("train-tower", words))
"""


def test_ranks_that_differ_are_refused_in_one_message(tmp_path: Path) -> None:
    tiny = make_all(tmp_path / "tiny")
    (tmp_path / "apart.py").write_text(APART)
    argv = options(tiny, Path("run"), "--deepspeed", str(ROOT / "scripts/zero1.json"))
    ranks = start(argv, 2, tmp_path / "apart.py", tmp_path)
    statuses = finish(ranks)
    said = "".join(rank.output for rank in ranks)
    assert statuses == [2, 2], said
    assert said.count("error: the ranks disagree before the first step:") == 1, said
    of_rank_1 = f"{tmp_path / '1' / 'run'} lacks a file"
    assert (
        f"output_dir: shared with rank 0 on {socket.gethostname()} (ranks 0); {of_rank_1}"
        in said
    )
    assert "setting optim.lr: 0.0004 on " in said
    assert "0.001 on " in said
    assert "DeepSpeed zero_optimization.stage: 1.0 on " in said
    assert "output_dir must be a folder that all hosts share" in said
    assert not list(tmp_path.glob("*/run/.shared-*"))
