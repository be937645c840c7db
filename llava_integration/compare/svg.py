"""Three plots as inline SVG without scripts: forest of differences, radar of scores, bars by category."""

import math
from collections.abc import Callable, Sequence
from html import escape

from llava_integration.compare.comparison import Comparison, Row
from llava_integration.compare.tables import number

SIDES = 6  # colors of page.css, base first
MOST_BARS = 20  # categories of a benchmark
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
WIDTH = 860


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
    """An SVG element that scales with the page, with a label for screen readers."""
    return (
        f'<svg id="{name}" role="img" aria-label="{escape(label, quote=True)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def forest(comparison: Comparison) -> str:
    """Differences with their intervals, one line per benchmark and side; new is better right of 0."""
    order = list(comparison.titles)
    rows = sorted(comparison.rows, key=lambda row: order.index(row.benchmark))  # stable: sides in their order
    ends = [value / _size(row) for row in rows for value in (row.result.low, row.result.high)]
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    margin = 0.06 * (high - low) or 1.0
    several = len(comparison.names) > 2
    left, right, top = 220.0, WIDTH - 190.0, 34.0 + 24.0 * several * len(comparison.names[1:])

    def x(value: float) -> float:
        return left + (value - low + margin) / (high - low + 2 * margin) * (right - left)

    lines, y = [], top - 15
    for place, row in enumerate(rows):
        first = place == 0 or row.benchmark != rows[place - 1].benchmark
        y += 30 if first else 20  # the sides of a benchmark stand together
        lines += _forest_row(row, color(comparison.names.index(row.new)), x, y, left, right, named=first)
    bottom = y + 15
    base, new = ("base", "new") if several else comparison.names
    parts = [
        text(x(0) - 10, top - 18, f"← {short(base, 24)} better", "end", 'class="dim"'),
        text(x(0) + 10, top - 18, f"{short(new, 24)} better →", extra='class="dim"'),
        *(legend(comparison.names[1:], left, 16, first=1) if several else []),
    ]
    for tick in ticks(low - margin, high + margin):
        parts += [
            line(x(tick), top - 8, x(tick), bottom, "var(--grid)"),
            text(x(tick), bottom + 18, f"{tick:g}", "middle"),
        ]
    parts.append(line(x(0), top - 8, x(0), bottom, "var(--ink)", 1.5))
    unit = "percentage points" + (" (MME: percent of its 2000)" if any(row.unit == "points" for row in rows) else "")
    parts += [*lines, text((left + right) / 2, bottom + 38, f"new minus base, {unit}", "middle", 'class="dim"')]
    return figure(WIDTH, bottom + 48, parts, "Differences with intervals", "forest")


def _size(row: Row) -> float:
    """How much of a row's unit is one percent."""
    return FULL_MME if row.unit == "points" else 1.0


def _forest_row(
    row: Row, paint: str, x: Callable[[float], float], y: float, left: float, right: float, *, named: bool
) -> list[str]:
    """One difference: name, interval, estimate (filled if significant), numbers."""
    result, size = row.result, _size(row)
    low, high = (number(value, row.unit, signed=True) for value in (result.low, result.high))
    label = f"{number(result.difference, row.unit, signed=True)} [{low}, {high}]"
    hint = f"{row.title}, {row.new}: {label}, Holm p {row.p_holm:.3g}, {row.verdict}"
    fill = "var(--paper)" if row.verdict == "no difference shown" else paint
    return [
        f'<g class="forest-row"><title>{escape(hint)}</title>',
        text(left - 12, y + 4, short(row.title, 30), "end") if named else "",
        line(x(result.low / size), y, x(result.high / size), y, paint, 2.5),
        f'<circle cx="{x(result.difference / size):.1f}" cy="{y:.1f}" r="5" stroke="{paint}" stroke-width="2.5" '
        f'fill="{fill}"/>',
        text(right + 12, y + 4, label, extra='class="number"'),
        "</g>",
    ]


def radar(comparison: Comparison) -> str:
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
    across, middle, radius = 300.0, 230.0, 175.0

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
        parts.append(text(x, y + 4, comparison.titles[name], anchor))
    for order, side in enumerate(comparison.names):
        corners = " ".join("{:.1f},{:.1f}".format(*point(place, share)) for place, share in enumerate(shares[side]))
        parts.append(
            f'<polygon class="side" points="{corners}" fill="{color(order)}" fill-opacity="0.08" '
            f'stroke="{color(order)}" stroke-width="2"><title>{escape(side)}</title></polygon>'
        )
    parts += legend(comparison.names, 600, 60)
    note = f"outer ring: best side; center: {floor:.0%} of it"
    parts.append(text(600, 60 + 24 * len(comparison.names) + 10, note, extra='class="dim"'))
    return figure(WIDTH, 2 * middle, parts, "Scores of all sides, relative to the best", "radar")


def legend(names: Sequence[str], x: float, y: float, first: int = 0) -> list[str]:
    """Colored names, one below another; ``first`` is the first one's number among the sides."""
    parts = []
    for order, name in enumerate(names):
        paint = color(order + first)
        parts.append(f'<rect x="{x}" y="{y + 24 * order - 10:.0f}" width="14" height="12" fill="{paint}"/>')
        parts.append(text(x + 22, y + 24 * order, short(name, 34)))
    return parts


def bars(comparison: Comparison, row: Row) -> str:
    """Mean score of base and new in the largest categories of a benchmark that has some."""
    shown = list(row.categories.items())[:MOST_BARS]
    percent = all(0 <= value <= 1 for old, now, _ in row.categories.values() for value in (old, now))
    scale = 100.0 if percent else 1.0
    top_value = 1.0 if percent else max(max(old, now) for _, (old, now, _) in shown) or 1.0
    left, right, step = 250.0, WIDTH - 200.0, 34.0
    parts = []
    for place, (name, (old, now, count)) in enumerate(shown):
        y = 8 + step * place
        parts.append(text(left - 12, y + 18, short(name, 36), "end"))
        for offset, value, order in ((2, old, 0), (15, now, comparison.names.index(row.new))):
            length = max(0.0, value / top_value) * (right - left)
            box = f'x="{left}" y="{y + offset:.0f}" width="{length:.1f}" height="11"'
            parts.append(
                f'<rect class="bar" {box} fill="{color(order)}">'
                f"<title>{escape(f'{name}: {scale * value:.1f}, {count} questions')}</title></rect>"
            )
        step_text = f"{scale * old:.1f} → {scale * now:.1f} ({scale * (now - old):+.1f}), n {count}"
        parts.append(text(right + 10, y + 18, step_text, extra='class="number"'))
    height = 8 + step * len(shown) + 8
    return figure(
        WIDTH, height, parts, f"{row.title} by category", f"bars-{row.benchmark}-{comparison.names.index(row.new)}"
    )
