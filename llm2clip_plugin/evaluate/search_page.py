"""What ``llm2clip search`` found as one HTML file: texts and pictures, no script, nothing fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.templates import page_style, render


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that was found for a text."""

    key: str  # of its sample
    score: float  # cosine
    picture: str | None  # data URI; None if it can't be read any more


@dataclass(frozen=True, kw_only=True)
class Result:
    """A text and the images nearest to it, best first."""

    text: str
    found: list[Found]


def search_page(title: str, intro: str, results: Sequence[Result]) -> str:
    """The page's HTML; every text is escaped."""
    template = Path(__file__).with_name("search_page.html")
    return render(template, title=title, intro=intro, results=results, style=page_style())
