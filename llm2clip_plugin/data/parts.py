"""Parts of a batch: drawn, handed over by loader processes, joined; the next batch while one is in use."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.data.sampler import Draw, Mixture, rank_rows

Batch = dict[str, Any]  # tensors and lists, one entry a row

SHUTDOWN = 10  # seconds that closing waits for the thread


class PartDraws:
    """Endless draws of one rank from ``position`` on, in parts of a batch: each belongs to one batch."""

    def __init__(
        self,
        mixture: Mixture,
        position: int,
        rank: int,
        world: int,
        local_batch: int,
        part: int,
        before: Callable[[int], None] = lambda position: None,
    ) -> None:
        """before: called with the position of each global batch."""
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, expected 0 .. {world - 1}")
        if local_batch < 1 or position < 0 or part < 1:
            raise ValueError(
                f"local_batch is {local_batch}, position {position}, part {part}; expected at least 1, 0 and 1"
            )
        self.mixture, self.position = mixture, position
        self.rank, self.world, self.local_batch, self.part = rank, world, local_batch, part
        self.before = before

    def __iter__(self) -> Iterator[list[Draw]]:
        position = self.position
        while True:
            self.before(position)
            draws = self.mixture.batch_indices(*rank_rows(position, self.rank, self.local_batch))
            for start in range(0, self.local_batch, self.part):
                yield draws[start : start + self.part]
            position += self.local_batch * self.world


def join_parts(parts: Iterable[Batch], rows: int, *, pin_memory: bool) -> Iterator[Batch]:
    """Batches of ``rows`` rows in memory of this process, so that the parts' shared memory is free at once.

    A batch has one part or more, in order. Raises ValueError if a part belongs to two batches.
    """
    batch: Batch = {}
    filled = 0
    for part in parts:
        size = len(part["keys"])
        if filled + size > rows:
            raise ValueError(f"a part of {size} rows does not fit into a batch of {rows} that has {filled}")
        for name, value in part.items():
            if isinstance(value, Tensor):
                if not filled:
                    batch[name] = torch.empty((rows, *value.shape[1:]), dtype=value.dtype, pin_memory=pin_memory)
                batch[name][filled : filled + size] = value
            else:
                batch[name] = [*batch.get(name, ()), *value]
        filled += size
        if filled == rows:
            yield batch
            batch, filled = {}, 0


class Ahead:
    """Items of an iterator, the next one made in a thread while the caller uses the last one.

    An exception of the iterator is raised in its place.
    """

    def __init__(self, items: Iterator[Any], closed: threading.Event, *, device: int | None = None) -> None:
        """closed: set by ``close``; ``items`` should end soon after. device: the GPU that memory is pinned for."""
        self._items = items
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(1)
        self._closed = closed
        self._thread = threading.Thread(target=self._run, args=(device,), name="llm2clip-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # raised again by the next call
            raise error
        self._wanted.release()
        return item

    @property
    def ready(self) -> int:
        """Items that can be taken without waiting: 0 or 1."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop; waits for the thread, unless it hangs in a read."""
        self._closed.set()
        self._wanted.release()
        if threading.current_thread() is not self._thread:  # a garbage collection may run there
            self._thread.join(SHUTDOWN)

    def _run(self, device: int | None) -> None:
        try:
            torch.set_num_threads(1)  # of this thread: copies must not take the training step's cores
            if device is not None:
                torch.cuda.set_device(device)  # of this thread: pinning would open a context on GPU 0 otherwise
            while self._wanted.acquire() and not self._closed.is_set():
                self._ready.put((next(self._items), None))
        except BaseException as error:  # StopIteration, too: the caller waits for one or the other
            self._ready.put((None, error))
        self._items = iter(())  # frees the loader processes
