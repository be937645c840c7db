"""Three plots as inline SVG without scripts: forest of differences, radar of scores, bars by category.

Each is drawn for a wide page and for a narrow one (a telephone), where names stand above what they name; page.css shows
the one that fits.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from llava_integration.compare.comparison import Comparison, Row
from llava_integration.compare.tables import number

SIDES = 6  # colors of page.css, base first
MOST_BARS = 20  # categories of a benchmark
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
WIDTH = 860
NARROW = 360  # what a page 400 px wide has space for


def color(place: int) -> str:
    """A side's color; page.css defines it for light and dark."""
    return f"var(--side-{place % SIDES})"


def text(x: float, y: float, content: str, anchor: str = "start", extra: str = "") -> str:
    """A text element; the content is escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(content)}</text>'


def short(name: str, most: int) -> str:
    """A name cut to a length."""
    return name if len(name) <= most else name[: most - 1] + "…"


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, extra: str = "") -> str:
    """A line element."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width}" {extra}/>'


def figure(width: float, height: float, parts: Sequence[str], label: str, name: str) -> str:
    """An SVG element that scales with the page, with a label for screen readers; shown where ``width`` fits."""
    fits = "narrow-plot" if width == NARROW else "wide-plot"
    name += "-narrow" if width == NARROW else ""
    return (
        f'<svg id="{name}" class="{fits}" role="img" aria-label="{escape(label, quote=True)}" '
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
        y += (50 if first else 36) if narrow else (30 if first else 20)  # the sides of a benchmark stand together
        lines += _forest_row(row, color(comparison.names.index(row.new)), x, y, left, right, named=first, above=narrow)
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
    base, new = ("base", "new") if len(comparison.names) > 2 else list(comparison.names)
    left, right, most = (8.0, width - 8.0, 18) if width == NARROW else (zero - 10, zero + 10, 24)
    anchors = ("start", "end") if width == NARROW else ("end", "start")
    return [
        text(left, y, f"← {short(base, most)} better", anchors[0], 'class="dim"'),
        text(right, y, f"{short(new, most)} better →", anchors[1], 'class="dim"'),
    ]


def _size(row: Row) -> float:
    """How much of a row's unit is one percent."""
    return FULL_MME if row.unit == "points" else 1.0


def _forest_row(
    row: Row, paint: str, x: Callable[[float], float], y: float, left: float, right: float, *, named: bool, above: bool
) -> list[str]:
    """One difference: name, interval, estimate (filled if significant), numbers; texts at its side or above."""
    result, size = row.result, _size(row)
    low, high = (number(value, row.unit, signed=True) for value in (result.low, result.high))
    label = f"{number(result.difference, row.unit, signed=True)} [{low}, {high}]"
    hint = f"{row.title}, {row.new}: {label}, Holm p {row.p_holm:.3g}, {row.verdict}"
    fill = "var(--paper)" if row.verdict == "no difference shown" else paint
    return [
        f'<g class="forest-row"><title>{escape(hint)}</title>',
        text(*((left, y - 14) if above else (left - 12, y + 4)), short(row.title, 30), "start" if above else "end")
        if named
        else "",
        line(x(result.low / size), y, x(result.high / size), y, paint, 2.5),
        f'<circle cx="{x(result.difference / size):.1f}" cy="{y:.1f}" r="5" stroke="{paint}" stroke-width="2.5" '
        f'fill="{fill}"/>',
        text(right, y - 14, label, "end", 'class="number"')
        if above
        else text(right + 12, y + 4, label, extra='class="number"'),
        "</g>",
    ]


def radar(comparison: Comparison, width: float = WIDTH) -> str:
    """Scores of every side relative to the best side of each axis; "" with fewer than three benchmarks."""
    names = [name for name in comparison.titles if len(comparison.scores[name]) == len(comparison.names)]
    if len(names) < 3:
        return ""
    best = {name: max(comparison.scores[name].values()) or 1.0 for name in names}
    shares = {
        side: [max(0.0, comparison.scores[name][side] / best[name]) for name in names] for side in comparison.names
    }
    worst = min(min(values) for values in shares.values())
    floor = max(0.0, min(0.8, math.floor((worst - 0.05) * 10) / 10))
    narrow = width == NARROW
    across, middle, radius = (width / 2, 140.0, 95.0) if narrow else (300.0, 230.0, 175.0)

    def point(place: int, share: float) -> tuple[float, float]:
        angle = 2 * math.pi * place / len(names) - math.pi / 2
        reach = radius * max(0.0, share - floor) / (1 - floor)
        return across + reach * math.cos(angle), middle + reach * math.sin(angle)

    parts = []
    for share in (floor + (1 - floor) * part / 4 for part in (1, 2, 3, 4)):
        corners = " ".join("{:.1f},{:.1f}".format(*point(place, share)) for place in range(len(names)))
        parts.append(f'<polygon points="{corners}" fill="none" stroke="var(--grid)"/>')
    for place, name in enumerate(names):
        parts.append(line(across, middle, *point(place, 1.0), "var(--grid)"))
        x, y = point(place, 1 + 0.13 * (1 - floor))
        anchor = "middle" if abs(x - across) < 20 else "start" if x > across else "end"
        title = short(comparison.titles[name], 16 if narrow else 40)
        x = max(x, 7.2 * len(title)) if anchor == "end" else x  # about the width of a text of 12 px
        parts.append(text(min(x, width - 7.2 * len(title)) if anchor == "start" else x, y + 4, title, anchor))
    for order, side in enumerate(comparison.names):
        corners = " ".join("{:.1f},{:.1f}".format(*point(place, share)) for place, share in enumerate(shares[side]))
        parts.append(
            f'<polygon class="side" points="{corners}" fill="{color(order)}" fill-opacity="0.08" '
            f'stroke="{color(order)}" stroke-width="2"><title>{escape(side)}</title></polygon>'
        )
    left, top = (8.0, 2 * middle + 14) if narrow else (600.0, 60.0)
    parts += legend(comparison.names, left, top)
    note = f"outer ring: best side; center: {floor:.0%} of it"
    end = top + 24 * len(comparison.names) + 10
    parts.append(text(left, end, note, extra='class="dim"'))
    return figure(
        width, end + 12 if narrow else 2 * middle, parts, "Scores of all sides, relative to the best", "radar"
    )


def legend(names: Sequence[str], x: float, y: float, first: int = 0) -> list[str]:
    """Colored names, one below another; ``first`` is the first one's number among the sides."""
    parts = []
    for order, name in enumerate(names):
        paint = color(order + first)
        parts.append(f'<rect x="{x}" y="{y + 24 * order - 10:.0f}" width="14" height="12" fill="{paint}"/>')
        parts.append(text(x + 22, y + 24 * order, short(name, 34)))
    return parts


def bars(comparison: Comparison, row: Row, width: float = WIDTH) -> str:
    """Mean score of base and new in the largest categories of a benchmark that has some."""
    shown = list(row.categories.items())[:MOST_BARS]
    percent = all(0 <= value <= 1 for old, now, _ in row.categories.values() for value in (old, now))
    scale = 100.0 if percent else 1.0
    top_value = 1.0 if percent else max(max(old, now) for _, (old, now, _) in shown) or 1.0
    narrow = width == NARROW
    left, right, step, above = (8.0, width - 8.0, 56.0, 20) if narrow else (250.0, width - 200.0, 34.0, 0)
    parts = []
    for place, (name, (old, now, count)) in enumerate(shown):
        y = 8 + step * place + above
        step_text = f"{scale * old:.1f} → {scale * now:.1f} ({scale * (now - old):+.1f}), n {count}"
        if narrow:
            parts.append(text(left, y - 6, short(name, 24)))
            parts.append(text(right, y - 6, step_text, "end", 'class="number"'))
        else:
            parts.append(text(left - 12, y + 18, short(name, 36), "end"))
            parts.append(text(right + 10, y + 18, step_text, extra='class="number"'))
        for offset, value, order in ((2, old, 0), (15, now, comparison.names.index(row.new))):
            length = max(0.0, value / top_value) * (right - left)
            box = f'x="{left}" y="{y + offset:.0f}" width="{length:.1f}" height="11"'
            parts.append(
                f'<rect class="bar" {box} fill="{color(order)}">'
                f"<title>{escape(f'{name}: {scale * value:.1f}, {count} questions')}</title></rect>"
            )
    height = 8 + step * len(shown) + 8
    return figure(
        width, height, parts, f"{row.title} by category", f"bars-{row.benchmark}-{comparison.names.index(row.new)}"
    )
