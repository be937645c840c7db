"""Ranks that are given different things say so before the first step, once, and end."""

from __future__ import annotations

import socket
from pathlib import Path

from tiny_data import make_all
from tower_runs import ROOT, finish, options, start

# every rank in a folder of its own, as with an output_dir on a node's own disk; rank 1 also has other settings
APART = """
import os, sys
from pathlib import Path
from llm2clip_plugin.cli import leave, run
rank = os.environ["RANK"]
Path(rank).mkdir()
os.chdir(rank)
leave(run("train-tower", [*sys.argv[1:], *(["--optim.lr", "1e-3", "--deepspeed", ""] if rank == "1" else [])]))
"""


def test_ranks_that_differ_are_refused_in_one_message(tmp_path: Path) -> None:
    tiny = make_all(tmp_path / "tiny")
    (tmp_path / "apart.py").write_text(APART)
    argv = options(tiny, Path("run"), "--deepspeed", str(ROOT / "scripts/zero1.json"))
    ranks = start(argv, 2, tmp_path / "apart.py", tmp_path)
    statuses = finish(ranks)
    said = "".join(rank.output for rank in ranks)
    assert statuses == [2, 2] and said.count("error: the ranks disagree before the first step:") == 1, said
    assert (
        f"output_dir: shared with rank 0 on {socket.gethostname()} (ranks 0); {tmp_path / '1' / 'run'} lacks a file"
        in said
    )
    assert "setting optim.lr: 0.0004 on " in said and "0.001 on " in said
    assert "DeepSpeed zero_optimization.stage: 1.0 on " in said
    assert "output_dir must be a folder that all hosts share" in said
    assert not list(tmp_path.glob("*/run/.shared-*"))
