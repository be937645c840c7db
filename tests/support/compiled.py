"""torch.compile without code generation, and how many graphs it has made after each step of a
run."""

import pytest
import torch
from torch._dynamo.utils import counters

from llm2clip_plugin.train import model
from llm2clip_plugin.train.step import ContrastiveStep

__all__ = ["graphs"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiled graphs after each training step so far: a list that grows."""
    torch._dynamo.reset()
    counters.clear()
    counts: list[int] = []
    step = ContrastiveStep.__call__

    def counted(self, batch, flags=None):
        values = step(self, batch, flags)
        counts.append(counters["stats"]["unique_graphs"])
        return values

    monkeypatch.setattr(model, "COMPILER", {"backend": "aot_eager"})
    monkeypatch.setattr(ContrastiveStep, "__call__", counted)
    return counts
