"""Captioned images. Here: processes that share the reading of a data set, and what they hand over in shared memory.

Standard library only.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(function: Callable[[Item], Result], items: Iterable[Item], *, processes: int) -> Iterator[Result]:
    """``function`` of each item in order, in processes that get it once; in this process if ``processes`` is below 2.
    What is left is dropped after an error or Ctrl-C, and the processes end when this one is killed."""
    if processes <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(processes, initializer=_begin, initargs=(function,))
    try:
        yield from map_in_order(pool, _call, items, ahead=8 * processes)
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """Results in order of the items, of which at most ``ahead`` are in work or waiting; ``pool.map`` takes them all."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_function: Callable[[Any], Any]  # of ``parallel``; set in each of its processes


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too; the parent ends them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Loader processes hand over images in parts of a batch, through a bounded amount of shared memory.

SHARED_MEMORY = "/dev/shm"  # where torch's loader processes put tensors on Linux
PREFETCH_MB = 256  # of /dev/shm, for each rank; 10^6 bytes
EVALUATION_MB = 64  # more during an evaluation, and in the fit of the heads
SMALL_PART = 16  # rows; a smaller part would cost more to hand over than it helps


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """The parts in which one rank's loader processes hand over its rows of a batch."""

    part: int  # rows that a loader process hands over at once
    prefetch: int  # parts that each loader process prepares ahead
    workers: int  # loader processes; 0: the rank itself loads, without shared memory
    row_bytes: int  # image and embedding of a row

    @property
    def shared_bytes(self) -> int:
        """Most bytes in shared memory: the parts prepared ahead, and the one that the rank copies out."""
        return (self.workers * self.prefetch + 1) * self.part * self.row_bytes if self.workers else 0


def row_bytes(side: int, width: int) -> int:
    """Bytes of a row: an RGB image of ``side`` pixels a side, and an embedding of ``width`` float32 values."""
    return 3 * side**2 + 4 * width


def plan_loading(*, rows: int, micro_batch: int, workers: int, row_bytes: int, prefetch_mb: float) -> LoadPlan:
    """Parts of at most a micro-batch, two or more ahead for each process, within ``prefetch_mb`` (10^6 bytes), but no
    more than two batches. Under a very small ``prefetch_mb`` each process prepares one row ahead."""
    if not workers:
        return LoadPlan(part=micro_batch, prefetch=0, workers=0, row_bytes=row_bytes)
    affordable = int(prefetch_mb * 1e6) // row_bytes  # rows
    spread = max(SMALL_PART, -(-rows // workers))  # every process has a share of every batch
    part = max(1, min(micro_batch, spread, affordable // (2 * workers + 1)))
    enough = max(2, -(-2 * rows // (part * workers)))
    prefetch = max(1, min(enough, (affordable // part - 1) // workers))
    return LoadPlan(part=part, prefetch=prefetch, workers=workers, row_bytes=row_bytes)


def plan_evaluation(batch: int, workers: int, side: int, width: int) -> LoadPlan:
    """Of an evaluation, or of the heads' fit: batches of images of ``side`` pixels and embeddings of ``width``."""
    sizes = {"rows": batch, "micro_batch": batch, "row_bytes": row_bytes(side, width)}
    return plan_loading(**sizes, workers=workers, prefetch_mb=EVALUATION_MB)


def lacks_shared_memory(plans: Sequence[LoadPlan], ranks: int, folder: str = SHARED_MEMORY) -> str:
    """Why ``ranks`` ranks on this machine can't load as planned, each with all of ``plans``; "" if they can."""
    need = ranks * sum(plan.shared_bytes for plan in plans)
    if not os.path.isdir(folder) or need <= (free := shutil.disk_usage(folder).free):  # not Linux: nothing to compare
        return ""
    return (
        f"{folder} has {free:,} bytes free, the loader processes of {ranks} ranks on this machine need {need:,}; start "
        f"the container with --ipc=host or --shm-size={-(-need // 10**9) + 1}g, or lower --dataloader-prefetch-mb or "
        "--workers (0 needs none)"
    )
