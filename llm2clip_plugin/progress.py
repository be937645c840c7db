"""What a rank does since when, and progress bars with rates and time left."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm


# What this rank is doing: the phase that messages name when it is late. Standard library only.

Value = TypeVar("Value")
CHECKPOINT = "checkpoint"  # the phase in which a rank that is to end gets more time


class Phase(NamedTuple):
    """What a rank does since when."""

    name: str
    step: int  # optimizer step, counted from 1; 0 before training
    # of phases begun: ranks that wait for each other are in phases of about the same number
    number: int
    since: float  # time.monotonic() of its begin, or of its last progress


_counter = itertools.count()
_now = Phase("start", 0, next(_counter), time.monotonic())


def current() -> Phase:
    """The phase that this process is in."""
    return _now


@contextmanager
def phase(name: str, *, step: int | None = None) -> Iterator[None]:
    """Name what the block, or the decorated function, does; every rank must begin the same phases
    in the same order. An exception leaves the phase as it is: messages say where it was raised."""
    global _now
    before = _now
    _now = Phase(
        name, before.step if step is None else step, next(_counter), time.monotonic()
    )
    yield
    _now = Phase(before.name, _now.step, next(_counter), time.monotonic())


def each_in_phase(
    name: str, items: Iterator[Value], *, first_step: int
) -> Iterator[Value]:
    """The items, one a step; waiting for each is a phase."""
    for step in itertools.count(first_step):
        with phase(name, step=step):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


# Progress bars: tqdm on stderr with rate and time left; where stderr is not a terminal, a line
# every ten seconds.

LINE_EVERY = 10.0  # seconds between lines where stderr is not a terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


class _Lines:
    """A file for tqdm that turns every redrawn bar into a line of stderr."""

    def write(self, text: str) -> None:
        if (
            text := text.strip()
        ):  # tqdm starts a redraw with \r, and pads it with spaces
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    *,
    total: int | None,
    label: str,
    unit: str,
    initial: int = 0,
    show: bool = True,
    delay: float = LINE_EVERY,
) -> tqdm:
    """A tqdm bar to be moved by ``update(count)`` and closed; it is a context manager. An update is
    a sign of progress.

    total: units of the whole job, None if unknown. initial: units done before. show: False for a
    silent bar, as on every rank but one. delay: seconds before the first line where stderr is not a
    terminal; a job that ends earlier prints none. With 0 the first and the last state are always
    printed.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            global _now
            _now = _now._replace(since=time.monotonic())
            return super().update(n)

    terminal = sys.stderr.isatty()
    return Bar(
        total=total,
        desc=label,
        unit=f" {unit}",
        initial=initial,
        disable=not show,
        bar_format=BAR if terminal else LINE,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else LINE_EVERY,
        miniters=1,
        delay=0 if terminal else delay,
        dynamic_ncols=terminal,
    )


def track(
    iterable: Iterable[Value],
    *,
    total: int | None,
    label: str,
    unit: str,
    show: bool = True,
) -> Iterator[Value]:
    """Yield from ``iterable`` under a bar that counts each item as one ``unit``; arguments as of
    ``progress_bar``."""
    with progress_bar(total=total, label=label, unit=unit, show=show) as bar:
        for item in iterable:
            yield item
            bar.update()
