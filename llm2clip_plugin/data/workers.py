"""What runs in the processes that read data ahead: how they end, and how they hand over batches and
errors."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

GRACE = 60  # seconds that a loader process outlives SIGTERM


# Errors of loader processes as they were raised: torch would put the process's traceback in front
# of the message.


class CollatedDataset(Dataset):
    """Batches of what ``read`` gives, with the ``seconds`` that took; a ValueError or OSError in
    place of one, with LLM2CLIP_TRACEBACK=1 to torch. For a DataLoader whose ``collate_fn`` is
    ``as_it_is``; ``raised`` raises the errors.
    """

    def __init__(
        self, read: Callable[[Any], Any], collate: Callable[[list[Any]], dict[str, Any]]
    ) -> None:
        self.read = read
        self.collate = collate

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        started = time.perf_counter()
        try:
            batch = self.collate([self.read(index) for index in indices])
            return batch | {"seconds": [time.perf_counter() - started]}
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


def leave_signals_to_the_run(worker: int) -> None:
    """In a loader process: keep loading for GRACE seconds after SIGTERM, and ignore Ctrl-C.

    Launchers send SIGTERM, and terminals SIGINT, to loader processes too. torch's handler would end
    them at once, and the run could not finish its step, save and stop. SIGTERM is not ignored: at
    exit, torch waits for these processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
