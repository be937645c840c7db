"""Which source each draw of an epoch, or each global batch, comes from: computed where it is needed, never stored."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from llm2clip_plugin.data.permutation import Permutation, hash_words

BLOCK = 1 << 16  # draws computed at once: fewer calls, and arrays that a processor's cache still holds
LONG = 1 << 20  # draws from which on several threads count
THREADS = 8
REMEMBERED = 64  # positions whose counts are kept


class SourceOrder:
    """The sources of an epoch's draws, in mixed order: draw i is of the source that owns number permutation(i).

    Source s owns as many of the numbers 0 .. length-1 as it has draws. How many draws of each source come before a
    position has no closed form, so the counts at recent positions are kept, and the draws from the nearest one to the
    position are counted. An epoch's beginning and end are known, so at most half an epoch is counted, and while a run
    reads on only the draws between its batches.
    """

    def __init__(self, draws: Sequence[int], key: int) -> None:
        self.stops = np.cumsum(np.asarray(draws, dtype=np.int64))
        self.length = int(self.stops[-1])
        self.permute = Permutation(self.length, key)
        self._ends = {0: np.zeros(len(draws), dtype=np.int64), self.length: np.asarray(draws, dtype=np.int64)}
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each of ``count`` draws from ``offset`` on, and how many of that source's come before it."""
        before = self.counts(offset)
        labels = np.concatenate(
            [self._labels(start, min(start + BLOCK, offset + count)) for start in range(offset, offset + count, BLOCK)]
        )
        ranks = np.empty(count, dtype=np.int64)
        after = before.copy()
        for source in np.unique(labels).tolist():
            here = labels == source
            number = int(np.count_nonzero(here))
            ranks[here] = before[source] + np.arange(number)
            after[source] += number
        self._remember(offset + count, after)
        return labels, ranks

    def counts(self, offset: int) -> np.ndarray:
        """(sources,) int64: draws of each source before ``offset``."""
        known = {**self._ends, **self._recent}
        nearest = min(known, key=lambda place: abs(place - offset))
        between = self._count(min(nearest, offset), max(nearest, offset))
        counts = known[nearest] + (between if nearest <= offset else -between)
        self._remember(offset, counts)
        return counts

    def _remember(self, offset: int, counts: np.ndarray) -> None:
        self._recent[offset] = counts
        self._recent.move_to_end(offset)
        if len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)

    def _count(self, start: int, stop: int) -> np.ndarray:
        """Draws of each source within start .. stop-1."""
        blocks = range(start, stop, BLOCK)
        if stop - start < LONG:
            return sum((self._count_block(block, stop) for block in blocks), self._ends[0])
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # numpy computes without Python's lock
            return sum(pool.map(lambda block: self._count_block(block, stop), blocks), self._ends[0])

    def _count_block(self, start: int, stop: int) -> np.ndarray:
        return np.bincount(self._labels(start, min(start + BLOCK, stop)), minlength=len(self.stops))

    def _labels(self, start: int, stop: int) -> np.ndarray:
        return np.searchsorted(self.stops, self.permute(np.arange(start, stop)), side="right")


class BatchOrder:
    """The sources of global batches that each come from one source, in mixed order.

    After e epochs a source with d draws an epoch has had floor(e d / batch) batches: what an epoch leaves of less than
    a batch is carried over to the next epoch, so no sample is dropped.
    """

    def __init__(self, draws: Sequence[int], batch: int, seed: int) -> None:
        self.draws = list(draws)
        self.batch = batch
        self.seed = seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __call__(self, step: int) -> tuple[int, list[int]]:
        """Source of a batch, and how many batches of each source come before it since the start of training."""
        epoch = step * self.batch // sum(self.draws)
        while sum(self._before(epoch + 1)) <= step:
            epoch += 1
        before = self._before(epoch)
        labels, _ = self._order(epoch)(step - sum(before), 1)
        counts = self._order(epoch).counts(step - sum(before)).tolist()
        return int(labels[0]), [earlier + here for earlier, here in zip(before, counts, strict=True)]

    def _before(self, epoch: int) -> list[int]:
        """Batches of each source in the epochs before ``epoch``."""
        return [epoch * draws // self.batch for draws in self.draws]

    def _make_order(self, epoch: int) -> SourceOrder:
        batches = [after - before for before, after in zip(self._before(epoch), self._before(epoch + 1), strict=True)]
        return SourceOrder(batches, hash_words("batches", self.seed, epoch))
