"""Errors of loader processes as they were raised: torch would put the process's traceback in front of the message."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset


class CollatedDataset(Dataset):
    """Batches of a dataset, with a ValueError or OSError in place of one; LLM2CLIP_TRACEBACK=1 leaves them to torch.

    For a DataLoader whose ``collate_fn`` is ``as_it_is``; ``raised`` raises the errors.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        try:
            return self.collate([self.dataset[index] for index in indices])
        except (ValueError, OSError) as error:
            if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
                raise
            return error


def as_it_is(batch: Any) -> Any:
    """A collate function for batches that are collated already."""
    return batch


def raised(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; an error among them is raised."""
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch
