"""Curves of training for a page: what metrics.jsonl of a run holds, as paths of an SVG."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 170, 34, 22, 8  # of the drawing, in its own units
TICKS = (1, 2, 2.5, 5, 10)  # steps of an axis, times a power of ten
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One training."""

    side: str  # raw | tuned
    points: list[Point]  # (step, value)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over steps, with axes from 0."""

    title: str
    words: str  # what is drawn, and which way is better
    lines: list[Line]

    @property
    def last(self) -> float:
        """The last step."""
        return max(x for line in self.lines for x, _ in line.points) or 1

    @property
    def y_ticks(self) -> list[float]:
        """Three or more numbers, from 0 to at least the largest value."""
        return ticks(max(y for line in self.lines for _, y in line.points))

    def paths(self) -> Iterator[tuple[str, str]]:
        """(side, SVG path) of each line."""
        for line in self.lines:
            yield line.side, "M" + " L".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in line.points)

    def x(self, step: float) -> float:
        """Where a step is drawn."""
        return LEFT + (WIDTH - LEFT - 6) * step / self.last

    def y(self, value: float) -> float:
        """Where a value is drawn."""
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / self.y_ticks[-1]


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 up to at least ``largest``, about four of them."""
    size = max(largest, 1e-9) / 3
    power = 10.0 ** math.floor(math.log10(size))
    step = next(step * power for step in TICKS if step * power >= size)
    return [round(step * number, 10) for number in range(math.ceil(largest / step - 1e-9) + 1)]


def read_metrics(run: Path) -> list[Mapping[str, float]]:
    """The lines of a run's metrics.jsonl; [] without it. A line that a killed run left cut is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def line_of(metrics: Iterable[Mapping[str, float]], side: str, names: Sequence[str]) -> list[Line]:
    """A line of the mean of ``names`` by step; [] where fewer than two steps have them. A later value replaces one."""
    points = {one["step"]: fmean(one[name] for name in names) for one in metrics if all(name in one for name in names)}
    return [Line(side=side, points=sorted(points.items()))] if len(points) > 1 else []
