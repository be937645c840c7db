"""Training batches. Loader processes hand over parts of a batch, images as bytes; images.Normalize
converts them where they are used. Rows of a global batch are a function of (seed, position),
whatever the number of workers and ranks."""

import logging
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip_plugin.data.pairs import PairDataset, collate
from llm2clip_plugin.data.sampler import Draw
from llm2clip_plugin.data.samples import PREFETCH_MB, BrokenSample, plan_loading
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.data.workers import (
    CollatedDataset,
    as_it_is,
    leave_signals_to_the_run,
    raised,
)
from llm2clip_plugin.outside import without_queries

log = logging.getLogger(__name__)

Batch = dict[str, Any]  # tensors and lists, one entry a row

LISTED = 20  # broken samples in an error
# of which a fraction is broken, so that one early sample can't stop a run
LEAST_ROWS = 1000
SHUTDOWN = 10  # seconds that closing waits for the thread
# sources whose windows don't fit into their ``cache_gb``, said once
_too_large: set[str] = set()


@dataclass(eq=False)
class PairLoader:
    """Endless batches of one rank from ``position`` on. Counts broken samples.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; spatial_shapes (b, 2) int64 if native
    (images.as_square); embeddings (b, W) float32 (absent without caches), caption_hashes and
    image_ids (b,) int64, captions and keys lists of b texts (with k captions an image, embeddings
    (b, k, W), caption_hashes (b, k), captions the first), position: pairs consumed after this
    batch, retries: reads that this rank has repeated so far, images_per_second: that one process
    reads. With ``workers`` the next batch is put together in a thread while the caller uses this
    one. Iterating raises ValueError when more than ``max_broken`` of this rank's samples are
    broken.
    """

    dataset: PairDataset
    _: KW_ONLY
    local_batch: int  # pairs of one rank in a batch
    micro_batch: int = 0  # pairs that a part of a batch has at most; 0: local_batch
    position: int = 0  # pairs that all ranks have consumed so far
    rank: int = 0
    world: int = 1
    # that the ranks are on, as many on each; the first of a node downloads its shards ahead
    nodes: int = 1
    workers: int = 0  # loader processes; the batches don't depend on it
    # 10^6 bytes of shared memory that the loader processes fill ahead
    prefetch_mb: float = PREFETCH_MB
    max_broken: float = 0.01  # fraction of broken samples above which the run stops
    # batches in page-locked memory, for copies to a GPU that don't wait
    pin_memory: bool = False
    rows: int = field(default=0, init=False)  # loaded
    # of these, rows that replace a broken sample
    substituted: int = field(default=0, init=False)
    # reads of data that were repeated after a transient error
    retries: int = field(default=0, init=False)
    # seconds that all processes together took for the rows
    reading: float = field(default=0.0, init=False)
    # (shard, key) -> reason
    broken: dict[tuple[str, str], str] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        plan = plan_loading(
            rows=self.local_batch,
            micro_batch=self.micro_batch or self.local_batch,
            workers=self.workers,
            row_bytes=self.dataset.row_bytes,
            prefetch_mb=self.prefetch_mb,
        )
        loader = DataLoader(
            CollatedDataset(self.dataset.__getitem__, collate),
            # endless, so it has no length
            batch_sampler=self._draws(plan.part),  # pyright: ignore[reportArgumentType]
            num_workers=self.workers,
            collate_fn=as_it_is,
            prefetch_factor=plan.prefetch if self.workers else None,
            worker_init_fn=leave_signals_to_the_run,
        )
        closed = threading.Event()
        # the loader processes start here
        parts = raised(takewhile(lambda part: not closed.is_set(), iter(loader)))
        batches = join_parts(parts, self.local_batch, pin_memory=self.pin_memory)
        if self.workers:
            device = torch.cuda.current_device() if self.pin_memory else None
            batches = made_ahead(batches, closed, device=device)
        del parts  # the thread alone holds the loader processes, and ends them
        with closing(batches):
            for number, batch in enumerate(batches, start=1):
                self._count(len(batch["keys"]), batch.pop("broken"))
                self.retries += sum(batch.pop("retries"))
                self.reading += sum(batch.pop("seconds"))
                position = self.position + number * self.local_batch * self.world
                rate = self.rows / self.reading
                yield {
                    **batch,
                    "position": position,
                    "retries": self.retries,
                    "images_per_second": rate,
                }

    def _draws(self, part: int) -> Iterator[list[Draw]]:
        """Endless draws of this rank, in parts of a batch: each belongs to one batch."""
        mixture = self.dataset.mixture()
        position = self.position
        batch = self.local_batch * self.world
        node, rank_of_node = divmod(self.rank, self.world // self.nodes)
        sources = enumerate(self.dataset.sources) if rank_of_node == 0 else ()
        remote = {
            number: source
            for number, source in sources
            if mixture.windows[number] and source.downloads_shards
        }
        fetched: dict[int, list[int]] = {}  # source -> shards of its next window
        while True:
            for number, source in remote.items():
                window, following = mixture.window_shards(
                    number, position, node, self.nodes, batch
                )
                if fetched.get(number) != following:
                    fetched[number] = following
                    download_ahead(source, window, following)
            draws = mixture.rank_draws(
                position, self.rank, self.local_batch, self.world
            )
            for start in range(0, self.local_batch, part):
                yield draws[start : start + part]
            position += batch

    def _count(self, rows: int, broken: list[tuple[BrokenSample, ...]]) -> None:
        self.rows += rows
        self.substituted += len(broken)
        for error in chain.from_iterable(broken):
            if (error.shard, error.key) not in self.broken:
                self.broken[error.shard, error.key] = error.reason
                log.warning("broken: %s; replaced by another sample", error)
        total = max(self.rows, min(len(self.dataset), LEAST_ROWS))
        if self.substituted > self.max_broken * total:
            listed: list[str] = []
            for (shard, key), reason in islice(self.broken.items(), LISTED):
                listed.append(f"  shard {shard!r}, sample {key!r}: {reason}")
            lines = "\n".join(listed)
            raise ValueError(
                f"{self.substituted} of {total} samples are broken, "
                f"more than max_broken {self.max_broken:g} allows:\n{lines}\n"
                "run `llm2clip data check DATA` to list them, then fix the data or raise max_broken"
            )


def join_parts(
    parts: Iterable[Batch], rows: int, *, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Batches of ``rows`` rows in memory of this process, so that the parts' shared memory is free
    at once.

    A batch has one part or more, in order.
    """
    batch: Batch = {}
    filled = 0
    for part in parts:
        size = len(part["keys"])
        assert filled + size <= rows, "a part of two batches"
        for name, value in part.items():
            if isinstance(value, Tensor):
                if not filled:
                    shape = (rows, *value.shape[1:])
                    batch[name] = torch.empty(
                        shape, dtype=value.dtype, pin_memory=pin_memory
                    )
                batch[name][filled : filled + size] = value
            else:
                batch[name] = [*batch.get(name, ()), *value]
        filled += size
        if filled == rows:
            yield batch
            batch = {}
            filled = 0


def made_ahead(
    items: Iterator[Batch], closed: threading.Event, *, device: int | None
) -> Generator[Batch, None, None]:
    """Items of an iterator, the next one made in a thread while the caller uses the last one.

    An exception in ``items`` is raised where its item would have come. closed: set when the caller
    is done; ``items`` must then end. device: the GPU that memory is pinned for.
    """
    ready: queue.SimpleQueue[tuple[Batch, BaseException | None]] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)

    def run() -> None:
        nonlocal items
        try:
            # of this thread: copies must not take the training step's cores
            torch.set_num_threads(1)
            if device is not None:
                # of this thread: pinning would open a context on GPU 0 otherwise
                torch.cuda.set_device(device)
            while wanted.acquire() and not closed.is_set():
                ready.put((next(items), None))
        except (
            BaseException
        ) as error:  # StopIteration, too: the caller waits for one or the other
            ready.put(({}, error))
        items = iter(())  # frees the loader processes

    thread = threading.Thread(target=run, name="llm2clip-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield item
    finally:
        closed.set()
        wanted.release()
        if (
            threading.current_thread() is not thread
        ):  # a garbage collection may run there
            thread.join(SHUTDOWN)  # unless it hangs in a read


def download_ahead(source: Source, window: list[int], following: list[int]) -> None:
    """Download the next window of shards in a thread, while one is read.

    If both don't fit into ``cache_gb`` that would evict what is being read: a warning is logged
    instead.
    """
    need = sum(source.stamps[shard][0] for shard in {*window, *following})
    limit = source.config.cache_gb * 1e9
    if 0 < limit < need:
        if source.path not in _too_large:
            log.warning(
                "%s: two windows of shards have %.1f GB, so training waits at the end of each; "
                "raise cache_gb or lower shuffle_window",
                without_queries(source.path),
                need / 1e9,
            )
        _too_large.add(source.path)
        return

    def download() -> None:
        try:
            for shard in following:
                source.use_shard(shard, Path.stat)
        except (OSError, ValueError) as error:
            # whoever reads the shard meets it again, and stops the run
            log.warning("shards could not be downloaded ahead: %s", error)

    threading.Thread(target=download, name="shards-ahead", daemon=True).start()
