"""Failures that are not input: the message names the rank and the reason; ranks without a launcher are refused."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from llm2clip_plugin.train.distributed import set_single_process_environment
from llm2clip_plugin.train.errors import lost_rank

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4213"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{GLOO}. This is typically caused by a remote worker crashing. GLHF!"), "Connection closed by"),
        (dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: ..."), "NCCL error in"),
        (dist.DistNetworkError(""), "DistNetworkError"),
    ],
)
def test_a_lost_rank_is_named(monkeypatch: pytest.MonkeyPatch, error: RuntimeError, reason: str):
    monkeypatch.setenv("RANK", "3")
    message = lost_rank(error)
    assert message.startswith("rank 3 on ") and reason in message and "GLHF" not in message and "\n" not in message
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SLURM_NTASKS", "16")  # of the whole job, also in the batch script
    set_single_process_environment()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "16")
    with pytest.raises(ValueError, match=variable):
        set_single_process_environment()
