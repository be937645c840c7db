"""A lost rank is one line, any other error is not taken for one; tasks without a launcher are refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm2clip_plugin.train.distributed import set_single_process_environment
from llm2clip_plugin.train.errors import lost_rank

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4213"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{GLOO}. This is typically caused by a remote worker crashing. GLHF!"), "Connection closed by"),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv"), "Timed out"),
        (dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: ..."), "NCCL error in"),
        (dist.DistNetworkError(""), "DistNetworkError"),
    ],
)
def test_a_lost_rank_is_named(monkeypatch: pytest.MonkeyPatch, error: RuntimeError, reason: str):
    monkeypatch.setenv("RANK", "3")
    message = lost_rank(error)
    assert message.startswith("rank 3 on ") and f"lost the connection to another rank: {reason}" in message
    assert "GLHF" not in message and "\n" not in message and "resumes from its last checkpoint" in message


def test_another_error_keeps_its_traceback():
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SLURM_NTASKS", "16")  # of the whole job, also in the batch script
    set_single_process_environment()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "16")
    with pytest.raises(
        ValueError, match=rf"started 16 tasks \({variable}\).* each would train alone; let it start one"
    ):
        set_single_process_environment()


@pytest.mark.parametrize(
    ("own", "master", "refused"), [("127.0.1.1", "10.0.0.1", True), ("127.0.1.1", "127.0.0.1", False)]
)
def test_a_host_that_would_announce_loopback_is_refused(
    monkeypatch: pytest.MonkeyPatch, own: str, master: str, refused: bool
):
    """Addresses resolve to themselves, so they stand for names."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": master}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(socket, "gethostname", lambda: own)
    if not refused:
        return set_single_process_environment()
    with pytest.raises(ValueError, match=r"127\.0\.1\.1 resolves to 127\.0\.1\.1 .* set GLOO_SOCKET_IFNAME"):
        set_single_process_environment()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    set_single_process_environment()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # all on this host
    set_single_process_environment()


def test_a_lock_of_a_killed_build_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm2clip_plugin.train.engine import note_build_locks

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    note_build_locks()
    assert capsys.readouterr().err == ""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    note_build_locks()
    assert f"note: {lock} exists: another process compiles cpu_adam" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    note_build_locks()
    assert capsys.readouterr().err == ""
