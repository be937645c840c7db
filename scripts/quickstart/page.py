"""The quickstart's table and page: text and HTML from numbers and pictures.

The page is one file that contains its styles and pictures, has no script and loads nothing from a network.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llm2clip_plugin.pages import render


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    below: str = ""  # caption below the table
    title: str = ""  # a question in plain words, on the page alone


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A retrieved image."""

    png: bytes
    title: str  # tooltip: name and style
    right: bool  # whether it shows the caption's emoji

    @property
    def base64(self) -> str:
        """The PNG, for a data: URL."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True, kw_only=True)
class Duel:
    """One query and the place at which each tower finds the right drawing."""

    picture: Picture  # the right one
    text: str
    language: str  # BCP 47 tag
    meaning: str
    raw: float  # place with the raw LLM; 1: first
    tuned: float
    pool: int  # drawings that are ranked

    @property
    def places(self) -> str:
        """``120 → 3``."""
        return f"{self.raw:.0f} → {self.tuned:.0f}"

    @property
    def outcome(self) -> str:
        """won | lost | tied, by the fine-tuned teacher."""
        return "tied" if self.raw == self.tuned else "won" if self.tuned < self.raw else "lost"

    @property
    def raw_at(self) -> float:
        """Percent of the axis: first place at 0, last at 100, logarithmic."""
        return self._at(self.raw)

    @property
    def tuned_at(self) -> float:
        """As raw_at."""
        return self._at(self.tuned)

    def _at(self, place: float) -> float:
        return round(100 * math.log(place) / math.log(max(2, self.pool)), 1)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A caption and the images that each tower retrieved for it, best first."""

    text: str
    language: str  # BCP 47 tag
    meaning: str  # English name; "" if the caption is the name
    found: dict[str, list[Picture]]  # tower -> pictures


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading of its own."""

    title: str
    sentences: list[str]  # headlines
    lists: dict[str, list[str]]  # title -> lines: what was shown and what was not
    words: str  # what the tables below measure
    tables: list[Table]
    queries: list[Query]


def cell(values: Sequence[float]) -> str:
    """Mean over seeds, with the standard deviation if there are several: ``.127 ± .009``."""
    if len(values) == 1:
        return fraction(values[0])
    return f"{fraction(fmean(values))} ± {fraction(stdev(values))}"


def fraction(value: float) -> str:
    """Three decimals without a leading zero: ``.127``, ``1.000``."""
    return f"{value:.3f}".removeprefix("0")


def as_text(table: Table) -> str:
    """The table as aligned text."""
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(words: Sequence[str]) -> str:
        first, *others = [word.ljust(width) for word, width in zip(words, widths, strict=True)]
        return "  ".join([first, *(word.strip().rjust(width) for word, width in zip(others, widths[1:], strict=True))])

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [line(table.head), rule, *map(line, table.rows)]
    return "\n".join([*body, *([table.below] if table.below else [])]) + "\n"


def page_html(
    title: str,
    intro: str,
    headlines: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
    queries: Sequence[Query],
    *,
    duels: Sequence[Duel] = (),
    maps: Any = None,
    charts: Sequence[Any] = (),
    sections: Sequence[Section] = (),
    comparison: str = "",
) -> str:
    """The HTML page, from the template page.html.

    ``maps``: embedding_map.Maps, or None. ``charts``: of charts.Chart. ``comparison``: relative link to LLaVA's page;
    "": none.
    """
    template = Path(__file__).with_name("page.html")
    values = {"title": title, "intro": intro, "headlines": headlines, "notes": notes, "tables": tables}
    counts = {outcome: sum(duel.outcome == outcome for duel in duels) for outcome in ("won", "lost")}
    shown = {"queries": queries, "duels": duels, "maps": maps, "charts": charts, "sections": sections}
    return render(template, **values, **counts, **shown, comparison=comparison)
