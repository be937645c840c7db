"""A difference with its interval, drawn in a table's cell: right of the line at 0 the new side is better."""

from collections.abc import Sequence
from html import escape

from llava_integration.compare.comparison import Row

SIDES = 6  # colors of page.css, base first
FULL_MME = 20.0  # points of MME perception that are one percent of its 2000
WIDTH, HEIGHT = 240, 18


def color(place: int) -> str:
    """A side's color; page.css defines it for light and dark."""
    return f"var(--side-{place % SIDES})"


def _ends(row: Row) -> tuple[float, float, float]:
    """Low end, estimate and high end of a row's difference, in percent."""
    size = FULL_MME if row.unit == "points" else 1.0
    return row.result.low / size, row.result.difference / size, row.result.high / size


def interval(row: Row, rows: Sequence[Row], paint: str) -> str:
    """The row's difference on the scale of all ``rows``; the mark is filled if the difference is significant."""
    every = [value for one in rows for value in _ends(one)]
    low, high = min(*every, 0.0), max(*every, 0.0)
    span = (high - low) or 1.0
    zero, left, middle, right = (8 + (value - low) / span * (WIDTH - 16) for value in (0.0, *_ends(row)))
    fill = "var(--paper)" if row.verdict == "no difference shown" else paint
    y = HEIGHT / 2
    return (
        f'<svg class="interval" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(f'{row.title}, {row.new}: {row.verdict}')}</title>"
        f'<line x1="{zero:.1f}" y1="0" x2="{zero:.1f}" y2="{HEIGHT}" stroke="var(--ink)"/>'
        f'<line x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}" stroke="{paint}" stroke-width="2.5"/>'
        f'<circle cx="{middle:.1f}" cy="{y}" r="5" stroke="{paint}" stroke-width="2.5" fill="{fill}"/></svg>'
    )
