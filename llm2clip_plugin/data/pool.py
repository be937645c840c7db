"""Processes that share the reading of a data set."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(function: Callable[[Item], Result], items: Iterable[Item], *, processes: int) -> Iterator[Result]:
    """``function`` of each item in order, in processes that get it once; in this process if ``processes`` is below 2.

    What is left is dropped after an error or Ctrl-C, and the processes end when this one is killed.
    """
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
