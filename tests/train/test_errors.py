"""A lost rank is one line, any other error is not taken for one."""

from __future__ import annotations

import pytest
import torch.distributed as dist

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
