"""Training batches: images, each with the teacher's embedding of one of its captions.

Loader processes hand over parts of a batch (data.parts), images as bytes; images.Normalize converts them where they
are used.

Shapes: b images of a batch on one rank, S pixels a side, W width of a teacher embedding, m captions.

The rows of a global batch are a function of (seed, position), whatever the number of workers and ranks. A sample that
can't be used is reported, counted and replaced by another, which is a function of (seed, sample).
"""

import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch.utils.data import DataLoader

from llm2clip_plugin.data.pair_dataset import PairDataset, collate
from llm2clip_plugin.data.parts import Ahead, PartDraws, join_parts
from llm2clip_plugin.data.shards_ahead import ShardsAhead
from llm2clip_plugin.data.shared_memory import PREFETCH_MB, LoadPlan, plan_loading
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.data.worker_errors import CollatedDataset, as_it_is, raised

log = logging.getLogger(__name__)

LISTED = 20  # broken samples in an error
GRACE = 60  # seconds that a loader process outlives SIGTERM


class PairLoader:
    """Endless batches of one rank. Counts broken samples and stops above the allowed fraction."""

    def __init__(
        self,
        loader: DataLoader,
        plan: LoadPlan,
        *,
        position: int,
        global_batch: int,
        samples: int,
        max_broken: float,
        pin_memory: bool,
    ) -> None:
        self._loader = loader
        self.plan = plan
        self._position = position
        self._global_batch = global_batch
        self._pin_memory = pin_memory
        # the fraction is of at least this many rows, so one early sample can't stop a run
        self._least_rows = min(samples, 1000)
        self.max_broken = max_broken
        self.rows = 0  # rows loaded
        self.substituted = 0  # of these, rows that replace a broken sample
        self.retries = 0  # reads of data that were repeated after a transient error
        self.broken: dict[tuple[str, str], str] = {}  # (shard, key) -> reason
        self._ahead: Callable[[], Ahead | None] = lambda: None  # weak references: see __iter__
        self._processes: Callable[[], Any] = lambda: None

    def queue(self) -> tuple[float, float]:
        """Batches that are ready, and that there is space for: one put together, the others in parts.

        (0, 0) without loader processes.
        """
        if not self.plan.workers:
            return 0.0, 0.0
        ahead, processes, parts = self._ahead(), self._processes(), 0
        if processes is not None:  # torch has no public way to ask
            parts = sum(len(task) > 1 for task in list(processes._task_info.values())) + processes._data_queue.qsize()
        part = self.plan.part / self.plan.rows  # of a batch
        return (ahead.ready if ahead else 0) + parts * part, 1 + self.plan.workers * self.plan.prefetch * part

    def __iter__(self) -> Iterator[dict[str, Any]]:
        closed = threading.Event()
        processes = iter(self._loader)  # the loader processes start here
        parts = raised(takewhile(lambda part: not closed.is_set(), processes))
        batches = join_parts(parts, self.plan.rows, pin_memory=self._pin_memory)
        if not self.plan.workers:
            yield from self._finished(batches)
            return
        ahead = Ahead(batches, closed, device=torch.cuda.current_device() if self._pin_memory else None)
        self._ahead, self._processes = weakref.ref(ahead), weakref.ref(processes)
        del processes, parts, batches  # the thread alone holds the loader processes, and ends them
        try:
            yield from self._finished(ahead)
        finally:
            ahead.close()
            # the thread's last exception refers to the thread's frame, so `ahead` lives until it is collected
            self._ahead = self._processes = lambda: None

    def _finished(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Batches whose broken samples and retries are counted, each with the position after it."""
        try:
            for number, batch in enumerate(batches, start=1):
                self._count(len(batch["keys"]), batch.pop("broken"))
                self.retries += sum(batch.pop("retries"))
                yield {**batch, "position": self._position + number * self._global_batch, "retries": self.retries}
        finally:
            if self.retries:
                log.warning("retried %d reads of data while loading %d rows", self.retries, self.rows)

    def _count(self, rows: int, broken: list[tuple[BrokenSample, ...]]) -> None:
        self.rows += rows
        self.substituted += len(broken)
        for error in (error for errors in broken for error in errors):
            if (error.shard, error.key) not in self.broken:
                self.broken[error.shard, error.key] = error.reason
                log.warning("broken: %s; replaced by another sample", error)
        if self.substituted > self.max_broken * max(self.rows, self._least_rows):
            listed = [f"  shard {shard!r}, sample {key!r}: {why}" for (shard, key), why in self.broken.items()]
            raise ValueError(
                f"{self.substituted} of {max(self.rows, self._least_rows)} samples are broken, more than max_broken "
                f"{self.max_broken:g} allows:\n"
                + "\n".join(listed[:LISTED])
                + "\nrun `llm2clip data check DATA` to list them, then fix the data or raise max_broken"
            )


def leave_signals_to_the_run(worker: int) -> None:
    """In a loader process: keep loading for GRACE seconds after SIGTERM, and ignore Ctrl-C.

    Launchers send SIGTERM, and terminals SIGINT, to loader processes too. torch's handler would end them at once, and
    the run could not finish its step, save and stop. SIGTERM is not ignored: at exit, torch waits for these processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


def make_loader(
    dataset: PairDataset,
    *,
    local_batch: int,  # pairs of one rank in a batch
    micro_batch: int = 0,  # pairs that a part of a batch has at most; 0: local_batch
    position: int = 0,  # pairs that all ranks have consumed so far
    rank: int = 0,
    world: int = 1,
    workers: int = 0,  # loader processes; the batches don't depend on it
    prefetch_mb: float = PREFETCH_MB,  # 10^6 bytes of shared memory that the loader processes fill ahead
    max_broken: float = 0.01,  # fraction of broken samples above which the run stops
    pin_memory: bool = False,
    whole_shards: bool = False,  # this machine reads all samples: fetch the next window of a network file system
) -> PairLoader:
    """Endless batches from ``position`` on.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; embeddings (b, W) float32 (absent without caches),
    caption_hashes and image_ids (b,) int64, captions, keys and shards lists of b texts (with k captions an image,
    embeddings (b, k, W), caption_hashes (b, k), captions the first), position: pairs consumed after this
    batch, retries: reads that this rank has repeated so far. With ``workers`` the next batch is put together in a
    thread while the caller uses this one.
    ``pin_memory``: in page-locked memory, for copies to a GPU that don't wait.
    Iterating raises ValueError when more than ``max_broken`` of this rank's samples are broken.
    """
    plan = plan_loading(
        rows=local_batch,
        micro_batch=micro_batch or local_batch,
        workers=workers,
        row_bytes=dataset.row_bytes,
        prefetch_mb=prefetch_mb,
    )
    mixture = dataset.mixture()
    ahead = ShardsAhead(mixture, dataset.sources, whole=whole_shards)
    draws = PartDraws(mixture, position, rank, world, local_batch, plan.part, ahead)
    loader = DataLoader(
        CollatedDataset(dataset, collate),
        batch_sampler=draws,  # pyright: ignore[reportArgumentType] - endless, so it has no length
        num_workers=workers,
        collate_fn=as_it_is,
        prefetch_factor=plan.prefetch if workers else None,
        worker_init_fn=leave_signals_to_the_run,
    )
    return PairLoader(
        loader,
        plan,
        position=position,
        global_batch=local_batch * world,
        samples=len(dataset),
        max_broken=max_broken,
        pin_memory=pin_memory,
    )
