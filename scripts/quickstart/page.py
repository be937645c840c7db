"""The quickstart's table and its page: text and HTML from numbers and pictures, nothing computed here.

The page is one file: styles and pictures are inside it, it has no script, and it asks nothing of a network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --right: #1a9850; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; opacity: .75; }
.query { border-top: 1px solid var(--line); padding: .8rem 0; }
.query h3 { margin: 0; font-size: 1.05rem; }
.query h3 small { font-weight: normal; opacity: .65; }
.found { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem; margin-top: .4rem; }
.found span { width: 9rem; opacity: .75; }
.found img { width: 72px; height: 72px; background: #fff; border: 3px solid transparent; border-radius: 6px; }
.found img.right { border-color: var(--right); }
.note { border-left: 4px solid #d73027; padding: .3rem .8rem; margin: 1rem 0; }
"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a head; the first column is the row's name."""

    head: list[str]
    rows: list[list[str]]
    below: str = ""  # what the numbers are


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A retrieved image."""

    png: bytes
    title: str  # shown on hovering: name and style
    right: bool  # whether it shows what the caption says


@dataclass(frozen=True, kw_only=True)
class Query:
    """A caption and what each tower retrieved for it, best first."""

    text: str
    language: str  # BCP 47 tag
    meaning: str  # the English name; "" if the caption is it
    found: dict[str, list[Picture]]  # tower -> pictures


def cell(values: Sequence[float]) -> str:
    """Mean of the seeds, with the standard deviation where there are several: ``.127 ± .009``."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return fraction(mean)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{fraction(mean)} ± {fraction(deviation)}"


def fraction(value: float) -> str:
    """Three decimals, no leading zero: ``.127``, ``1.000``."""
    return f"{value:.3f}".removeprefix("0")


def as_text(table: Table) -> str:
    """The table for a terminal."""
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(words: Sequence[str]) -> str:
        first, *others = [word.ljust(width) for word, width in zip(words, widths, strict=True)]
        return "  ".join([first, *(word.strip().rjust(width) for word, width in zip(others, widths[1:], strict=True))])

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [line(table.head), rule, *map(line, table.rows)]
    return "\n".join([*body, *([table.below] if table.below else [])]) + "\n"


def table_html(table: Table) -> str:
    """The table as HTML."""
    head = "".join(f"<th>{escape(word)}</th>" for word in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in table.rows)
    below = f"<caption>{escape(table.below)}</caption>" if table.below else ""
    return f"<table>{below}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def picture_html(picture: Picture) -> str:
    """One image, its bytes inside."""
    data = base64.b64encode(picture.png).decode()
    title = escape(picture.title, quote=True)
    kind = ' class="right"' if picture.right else ""
    return f'<img{kind} src="data:image/png;base64,{data}" alt="{title}" title="{title}">'


def query_html(query: Query) -> str:
    """A caption with a row of pictures a tower."""
    meaning = f" <small>{escape(query.meaning)}</small>" if query.meaning else ""
    rows = "".join(
        f'<div class="found"><span>{escape(tower)}</span>{"".join(map(picture_html, pictures))}</div>'
        for tower, pictures in query.found.items()
    )
    tag = escape(query.language, quote=True)
    heading = f'<h3><bdi lang="{tag}">{escape(query.text)}</bdi> <small>[{tag}]</small>{meaning}</h3>'
    return f'<div class="query">{heading}{rows}</div>'


def page_html(title: str, intro: str, notes: Sequence[str], tables: Sequence[Table], queries: Sequence[Query]) -> str:
    """The whole page."""
    warnings = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(intro)}</p>{warnings}"
        f"{''.join(map(table_html, tables))}<h2>What the towers retrieve</h2>"
        "<p>The best eight of all drawings of the test families, which training never saw, for a dozen captions picked "
        "by chance. A green border: it shows what the caption says.</p>"
        f"{''.join(map(query_html, queries))}</body></html>\n"
    )
