"""Curves of training for a page: what metrics.jsonl of a run holds, as paths of an SVG."""

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

# HTML pages from jinja2 templates. jinja2 comes with torch and is imported when a page is made.


def page_style() -> str:
    """The CSS that every page of ours starts with: colors, also for dark screens, widths and headings."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def render(template: Path, **values: object) -> str:
    """The text of a template file: every value is escaped (``markupsafe.Markup`` is not), an unknown name is an error.

    The template can include and extend the files in its folder.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


# Pictures in a page: small JPEGs as data URIs, so that the page is one file and fetches nothing.

SIDE = 256  # pixels of the longer side
QUALITY = 70


def thumbnail(raw: bytes | None) -> str | None:
    """An image file's bytes as the data URI of a small JPEG; None for bytes that are not a picture."""
    if not raw:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            opened.draft("RGB", (SIDE, SIDE))
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
