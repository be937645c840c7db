"""Errors of loader processes as they were raised: torch would put the process's traceback in front of the message."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Failure:
    """An error in place of an item, or of a batch with such an item."""

    error: Exception


class Guarded(Dataset):
    """A dataset whose ValueError and OSError are items; LLM2CLIP_TRACEBACK=1 leaves them to torch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
                raise
            return Failure(error)


@dataclass(frozen=True)
class GuardedCollate:
    """``collate``, or the first failure among the items."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        failure = next((item for item in items if isinstance(item, Failure)), None)
        return self.collate(items) if failure is None else failure


def raised(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; a failure among them is raised."""
    for batch in batches:
        if isinstance(batch, Failure):
            raise batch.error
        yield batch
