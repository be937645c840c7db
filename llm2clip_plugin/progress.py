"""A progress bar with rate and time left, on stderr; one line now and then where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PLAIN_EVERY = 10.0  # seconds between lines where stderr is not a terminal


def track(iterable: Iterable[Item], *, total: int | None, label: str, unit: str) -> Iterator[Item]:
    """Yield from ``iterable`` while showing ``label``, done/total, units a second and the time left.

    ``total`` is the number of items, or None where nobody knows; each item counts as one ``unit``.
    """
    if sys.stderr.isatty():
        yield from _bar(iterable, total, label, unit)
    else:
        yield from _lines(iterable, total, label, unit)


def _bar(iterable: Iterable[Item], total: int | None, label: str, unit: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, rate="")
        for done, item in enumerate(iterable, 1):
            yield item
            rate = done / max(time.monotonic() - started, 1e-9)
            progress.update(task, advance=1, rate=f"{rate:.3g} {unit}/s")


def _lines(iterable: Iterable[Item], total: int | None, label: str, unit: str) -> Iterator[Item]:
    started = said = time.monotonic()
    done = 0
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - said >= PLAIN_EVERY:
            said = now
            print(describe(label, done, total, now - started, unit), file=sys.stderr, flush=True)
    if said != started:
        print(describe(label, done, total, time.monotonic() - started, unit), file=sys.stderr, flush=True)


def describe(label: str, done: int, total: int | None, seconds: float, unit: str) -> str:
    """``embed: 1200/4800 captions, 64.1 captions/s, 56 s left``."""
    rate = done / max(seconds, 1e-9)
    if total is None:
        return f"{label}: {done} {unit}, {rate:.3g} {unit}/s"
    left = (total - done) / max(rate, 1e-9)
    return f"{label}: {done}/{total} {unit}, {rate:.3g} {unit}/s, {left:.0f} s left"
