"""Progress bars: tqdm on stderr with rate and time left; where stderr is not a terminal, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import llm2clip_plugin.phases as phases

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")

LINE_EVERY = 10.0  # seconds between lines where stderr is not a terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


class _Lines:
    """A file for tqdm that turns every redrawn bar into a line of stderr."""

    def write(self, text: str) -> None:
        if text := text.strip():  # tqdm starts a redraw with \r, and pads it with spaces
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    *, total: int | None, label: str, unit: str, initial: int = 0, show: bool = True, delay: float = LINE_EVERY
) -> tqdm:
    """A tqdm bar to be moved by ``update(count)`` and closed; it is a context manager. An update is a sign of progress.

    total: units of the whole job, None if unknown. initial: units done before. show: False for a silent bar, as on
    every rank but one. delay: seconds before the first line where stderr is not a terminal; a job that ends earlier
    prints none. With 0 the first and the last state are always printed.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            phases.progressed()
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


def track(iterable: Iterable[Item], *, total: int | None, label: str, unit: str, show: bool = True) -> Iterator[Item]:
    """Yield from ``iterable`` under a bar that counts each item as one ``unit``; arguments as of ``progress_bar``."""
    with progress_bar(total=total, label=label, unit=unit, show=show) as bar:
        for item in iterable:
            yield item
            bar.update()
