"""The report as one HTML file: verdicts, plots, tables, and the questions on which the sides disagree.

Nothing is fetched: style, script, plots and pictures are in the file, and its content security policy allows no request
and no script but the page's own (by hash). The template escapes every text; the script inserts answers as text nodes.
"""

import base64
import hashlib
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from llava_integration.compare import report as tables
from llava_integration.compare.comparison import Comparison, Row, Side
from llava_integration.compare.report import Pictures, disagreements, number
from llm2clip_plugin.pages import page_style, render

# Two plots as inline SVG without scripts: forest of differences, bars by category.

SIDES = 6  # colors of page.css, base first
MOST_BARS = 20  # categories of a benchmark
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
WIDTH = 860
NARROW = 360  # what a page 400 px wide has space for
NAME, NARROW_NAME = 30, 24  # letters of a line that have space next to, or above, a mark


def color(place: int) -> str:
    """A side's color; page.css defines it for light and dark."""
    return f"var(--side-{place % SIDES})"


def text(x: float, y: float, content: str, anchor: str = "start", extra: str = "") -> str:
    """A text element; the content is escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(content)}</text>'


LEADING = 14  # between two lines of a name


def wrapped(name: str, most: int) -> list[str]:
    """A name in lines of at most so many letters."""
    return textwrap.wrap(name, most) or [""]


def label(x: float, y: float, lines: Sequence[str], anchor: str = "start") -> str:
    """A name in one or more lines, the last one at ``y``."""
    return "".join(text(x, y - LEADING * up, content, anchor) for up, content in enumerate(reversed(lines)))


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, extra: str = "") -> str:
    """A line element."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width}" {extra}/>'


def figure(width: float, height: float, parts: Sequence[str], label: str, name: str) -> str:
    """An SVG element that scales with the page, with a label for screen readers; shown where ``width`` fits."""
    fits = "narrow-plot" if width == NARROW else "wide-plot"
    name += "-narrow" if width == NARROW else ""
    return (
        f'<svg id="{escape(name, quote=True)}" class="{fits}" role="img" aria-label="{escape(label, quote=True)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def forest(comparison: Comparison, width: float = WIDTH) -> str:
    """Differences with their intervals, one line per benchmark and side; new is better right of 0."""
    order = list(comparison.titles)
    rows = sorted(comparison.rows, key=lambda row: order.index(row.benchmark))  # stable: sides in their order
    ends = [value / _size(row) for row in rows for value in (row.result.low, row.result.high)]
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    margin = 0.06 * (high - low) or 1.0
    several, narrow = len(comparison.names) > 2, width == NARROW
    left, right = (8.0, width - 8.0) if narrow else (220.0, width - 190.0)
    top = 34.0 + 24.0 * several * len(comparison.names[1:])

    def x(value: float) -> float:
        return left + (value - low + margin) / (high - low + 2 * margin) * (right - left)

    lines, y = [], top - 15
    for place, row in enumerate(rows):
        first = place == 0 or row.benchmark != rows[place - 1].benchmark
        name = wrapped(row.title, NAME if not narrow else NARROW_NAME) if first else []
        y += (50 if first else 36) if narrow else (30 if first else 20)  # the sides of a benchmark stand together
        y += LEADING * max(0, len(name) - 1)
        lines += _forest_row(row, color(comparison.names.index(row.new)), x, y, left, right, name=name, above=narrow)
    bottom = y + 15
    parts = _directions(comparison, x(0), top - 18, width)
    parts += legend(comparison.names[1:], left, 16, first=1) if several else []
    for tick in ticks(low - margin, high + margin):
        parts += [
            line(x(tick), top - 8, x(tick), bottom, "var(--grid)"),
            text(x(tick), bottom + 18, f"{tick:g}", "middle"),
        ]
    parts.append(line(x(0), top - 8, x(0), bottom, "var(--ink)", 1.5))
    notes = ["new minus base, percentage points"]
    if any(row.unit == "points" for row in rows):
        mme = "(MME: percent of its 2000)"
        notes = [*notes, mme] if narrow else [f"{notes[0]} {mme}"]
    parts += lines
    for place, note in enumerate(notes):
        parts.append(text((left + right) / 2, bottom + 38 + 16 * place, note, "middle", 'class="dim"'))
    return figure(width, bottom + 32 + 16 * len(notes), parts, "Differences with intervals", "forest")


def _directions(comparison: Comparison, zero: float, y: float, width: float) -> list[str]:
    """Which side is better left and right of 0: next to its line, or at the edges of a narrow plot."""
    left, right, most = (8.0, width - 8.0, 18) if width == NARROW else (zero - 10, zero + 10, 24)
    fit = len(comparison.names) == 2 and max(map(len, comparison.names)) <= most
    base, new = comparison.names if fit else ("base", "new")
    anchors = ("start", "end") if width == NARROW else ("end", "start")
    return [
        text(left, y, f"← {base} better", anchors[0], 'class="dim"'),
        text(right, y, f"{new} better →", anchors[1], 'class="dim"'),
    ]


def _size(row: Row) -> float:
    """How much of a row's unit is one percent."""
    return FULL_MME if row.unit == "points" else 1.0


def _forest_row(
    row: Row,
    paint: str,
    x: Callable[[float], float],
    y: float,
    left: float,
    right: float,
    *,
    name: Sequence[str],
    above: bool,
) -> list[str]:
    """One difference: name, interval, estimate (filled if significant), numbers; texts at its side or above."""
    result, size = row.result, _size(row)
    low, high = (number(value, row.unit, signed=True) for value in (result.low, result.high))
    numbers = f"{number(result.difference, row.unit, signed=True)} [{low}, {high}]"
    hint = f"{row.title}, {row.new}: {numbers}, Holm p {row.p_holm:.3g}, {row.verdict}"
    fill = "var(--paper)" if row.verdict == "no difference shown" else paint
    return [
        f'<g class="forest-row"><title>{escape(hint)}</title>',
        label(left, y - 14, name) if above else label(left - 12, y + 4, name, "end"),
        line(x(result.low / size), y, x(result.high / size), y, paint, 2.5),
        f'<circle cx="{x(result.difference / size):.1f}" cy="{y:.1f}" r="5" stroke="{paint}" stroke-width="2.5" '
        f'fill="{fill}"/>',
        text(right, y - 14, numbers, "end", 'class="number"')
        if above
        else text(right + 12, y + 4, numbers, extra='class="number"'),
        "</g>",
    ]


def legend(names: Sequence[str], x: float, y: float, first: int = 0) -> list[str]:
    """Colored names, one below another; ``first`` is the first one's number among the sides."""
    parts = []
    for order, name in enumerate(names):
        paint = color(order + first)
        parts.append(f'<rect x="{x}" y="{y + 24 * order - 10:.0f}" width="14" height="12" fill="{paint}"/>')
        parts.append(text(x + 22, y + 24 * order, name))
    return parts


def bars(comparison: Comparison, row: Row, width: float = WIDTH) -> str:
    """Mean score of base and new in the largest categories of a benchmark that has some."""
    shown = list(row.categories.items())[:MOST_BARS]
    percent = all(0 <= value <= 1 for old, now, _ in row.categories.values() for value in (old, now))
    scale = 100.0 if percent else 1.0
    top_value = 1.0 if percent else max(max(old, now) for _, (old, now, _) in shown) or 1.0
    narrow = width == NARROW
    left, right, step, above = (8.0, width - 8.0, 56.0, 20) if narrow else (250.0, width - 200.0, 34.0, 0)
    parts, y = [], 8.0 + above - step
    for name, (old, now, count) in shown:
        lines = wrapped(name, NARROW_NAME if narrow else NAME)
        y += step + LEADING * (len(lines) - 1)
        step_text = f"{scale * old:.1f} → {scale * now:.1f} ({scale * (now - old):+.1f}), n {count}"
        if narrow:
            parts.append(label(left, y - 6, lines))
            parts.append(text(right, y - 6, step_text, "end", 'class="number"'))
        else:
            parts.append(label(left - 12, y + 18, lines, "end"))
            parts.append(text(right + 10, y + 18, step_text, extra='class="number"'))
        for offset, value, order in ((2, old, 0), (15, now, comparison.names.index(row.new))):
            length = max(0.0, value / top_value) * (right - left)
            box = f'x="{left}" y="{y + offset:.0f}" width="{length:.1f}" height="11"'
            parts.append(
                f'<rect class="bar" {box} fill="{color(order)}">'
                f"<title>{escape(f'{name}: {scale * value:.1f}, {count} questions')}</title></rect>"
            )
    height = y + step - above + 8
    return figure(
        width, height, parts, f"{row.title} by category", f"bars-{row.benchmark}-{comparison.names.index(row.new)}"
    )


HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What goes into the page."""

    images: Path | None = None  # folder of evaluation folders, or of one benchmark
    with_images: bool = True
    questions: int = 80  # disagreements per benchmark and pair of sides, wins and losses evenly


def page(comparison: Comparison, sides: Sequence[Side], options: PageOptions) -> str:
    """The page's HTML."""
    style = page_style() + (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures = Pictures(sides, options.images if options.with_images else None, enabled=options.with_images)
    questions = [
        question for row in comparison.rows for question in disagreements(row, sides, pictures, options.questions)
    ]
    several = len(comparison.names) > 2

    def row_name(row: Row, separator: str) -> str:
        return f"{row.title}{separator}{row.new}" if several else row.title

    def difference_cells(row: Row) -> list[tuple[str | float, str]]:
        """(value to sort by, text) of each column."""
        result = row.result
        values = [row.title, result.base, result.new, result.difference, result.high - result.low, result.p,
                  row.p_holm, row.wins, row.losses, row.verdict]  # fmt: skip
        cells = list(zip(values, tables.cells(row), strict=True))
        return [(row.new, row.new), *cells] if several else cells

    return render(
        HERE / "page.html",
        comparison=comparison,
        title=f"{' · '.join(comparison.names[1:])} against {comparison.names[0]}",
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=style,
        script=script,
        verdicts=[(name, _verdict(rows)) for name, rows in comparison.pairs()],
        forest=_twice(lambda width: forest(comparison, width)),
        categories=[
            (row, _twice(lambda width, row=row: bars(comparison, row, width)))
            for row in comparison.rows
            if row.categories
        ],
        header=["new side", *tables.HEADER] if several else tables.HEADER,
        with_scores=several or len(comparison.titles) != len(comparison.rows) or bool(comparison.references),
        notes=[*_notes(comparison, row_name), *pictures.notes()],
        data={"names": comparison.names, "questions": questions, "images": pictures.encoded},
        difference_cells=difference_cells,
        row_name=row_name,
        number=tables.number,
        color=color,
        most_bars=MOST_BARS,
        published_note=tables.NOTE,
    )


def _twice(plot: Callable[[float], str]) -> str:
    """A plot for wide and for narrow pages."""
    return plot(WIDTH) + plot(NARROW)


def _verdict(rows: Sequence[Row]) -> str:
    """One sentence for a pair of sides."""
    groups = {verdict: [row for row in rows if row.verdict == verdict] for verdict in ("better", "worse")}
    parts = [
        f"{verdict} on "
        + ", ".join(f"{row.title} ({tables.number(row.result.difference, row.unit, signed=True)})" for row in group)
        for verdict, group in groups.items()
        if group
    ]
    rest = len(rows) - sum(map(len, groups.values()))
    return "; ".join([*parts, *([f"no difference shown on {rest} of {len(rows)}"] if rest else [])])


def _notes(comparison: Comparison, row_name: Callable[[Row, str], str]) -> list[str]:
    """Methods, and the notes of every row."""
    lines = [*tables.method_lines(comparison), *comparison.notes]
    if any(max(row.runs) > 1 for row in comparison.rows):
        lines.append("With several runs, the browser shows the answers of the first.")
    for row in comparison.rows:
        name = row_name(row, ", ")
        lines += [f"{name}: {note}" for note in row.notes]
        if row.p_mcnemar is not None:
            lines.append(f"{name}: McNemar p {tables.p_value(row.p_mcnemar)} (ignores shared images)")
    return lines
