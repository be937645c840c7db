"""Ctrl-C and SIGHUP while a rank waits for another."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import Script
from tower_runs import ROOT, environment, options

from llm2clip_plugin.train.distributed import free_port


@pytest.mark.parametrize(
    ("rank", "number", "says"),
    [
        (0, signal.SIGINT, "interrupted\n"),
        (1, signal.SIGHUP, ""),
    ],
)
def test_a_rank_that_waits_for_another_ends_in_a_line(
    tiny: Path, tmp_path: Path, rank: int, number: int, says: str
) -> None:
    """In torch's C++, which prints its stack at a signal and goes on: rank 0 waits for rank 1, rank 1 for an answer."""
    port = free_port()
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with socket.socket() as other:
        if rank == 1:  # a rank 0 that listens and never answers
            other.bind(("127.0.0.1", port))
            other.listen()
        argv = options(tiny, tmp_path / "run")
        script = Script(ROOT / "scripts/train_tower.py", argv, environment(**ranks, **address), ROOT)
        try:
            if rank == 1:
                other.settimeout(300)
                _connection, _ = other.accept()  # kept open
            else:
                deadline = time.monotonic() + 300
                while other.connect_ex(("127.0.0.1", port)):
                    assert time.monotonic() < deadline and script.poll() is None, script.output
                    time.sleep(0.05)
            os.kill(script.pid or 0, number)
            assert script.wait(timeout=10) == 128 + number
        finally:
            script.kill()
    assert script.output == says
    assert not (tmp_path / "run").exists()
