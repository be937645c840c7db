"""The report as one HTML file: verdicts, tables, and the questions on which the sides disagree.

Nothing is fetched: style, script, drawings and pictures are in the file, and its content security policy allows no
request and no script but the page's own (by hash). The template escapes every text; the script inserts answers as text.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from llava_integration.compare import report as tables
from llava_integration.compare.comparison import Comparison, Row, Side
from llava_integration.compare.report import Pictures, disagreements
from llm2clip_plugin.pages import page_style, render

# A difference with its interval, drawn in a table's cell: right of the line at 0 the new side is better.

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


HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What goes into the page."""

    images: Path | None = None  # folder of evaluation folders, or of one benchmark
    with_images: bool = True
    questions: int = 80  # disagreements per benchmark and pair of sides, wins and losses evenly


def page(comparison: Comparison, sides: Sequence[Side], options: PageOptions) -> str:
    """The page's HTML."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures = Pictures(sides, options.images if options.with_images else None, enabled=options.with_images)
    questions = [
        question for row in comparison.rows for question in disagreements(row, sides, pictures, options.questions)
    ]
    return render(
        HERE / "page.html",
        comparison=comparison,
        title=f"{' · '.join(comparison.names[1:])} against {comparison.names[0]}",
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=page_style() + (HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        verdicts=[(name, _verdict(rows)) for name, rows in comparison.pairs()],
        notes=[*_notes(comparison), *pictures.notes()],
        data={"names": comparison.names, "questions": questions, "images": pictures.encoded},
        interval=lambda row: interval(row, comparison.rows, color(comparison.names.index(row.new))),
        tables=tables,
        color=color,
    )


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


def _notes(comparison: Comparison) -> list[str]:
    """Methods, and the notes of every row."""
    lines = [*tables.method_lines(comparison), *comparison.notes]
    if any(max(row.runs) > 1 for row in comparison.rows):
        lines.append("With several runs, the browser shows the answers of the first.")
    for row in comparison.rows:
        name = f"{row.title}, {row.new}" if len(comparison.names) > 2 else row.title
        lines += [f"{name}: {note}" for note in (row.power_line(), *row.notes)]
    return lines
