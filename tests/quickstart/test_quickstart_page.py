"""The quickstart's page: self-contained, and what comes from data is shown as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from page import Duel, Picture, Query, Table, as_text, cell, page_html

TABLE = Table(head=["test", "a", "b"], rows=[["one <b>", ".1 / .2", ".3"], ["two", ".4", ".5"]], below="what & why")


class Reader(HTMLParser):
    """Collects tags, attributes and text; notes what is left open."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_page() -> tuple[str, Reader]:
    evil = '<script>alert("x")</script>'
    queries = [
        Query(
            text=evil,
            language='ar" onload="x',
            meaning="owl",
            found={
                "tower": [
                    Picture(png=b"\x89PNG1", title='a "b" <i>', right=True),
                    Picture(png=b"2", title="c", right=False),
                ]
            },
        )
    ]
    drawing = Picture(png=b"3", title="owl", right=True)
    common = {"picture": drawing, "text": evil, "language": "de", "meaning": "owl", "pool": 100}
    duels = [Duel(**common, raw=100, tuned=10), Duel(**common, raw=1, tuned=2.5)]
    page = page_html("Title & more", evil, [evil], [evil], [TABLE], queries, duels=duels, comparison="llava/a.html")
    reader = Reader()
    reader.feed(page)
    return page, reader


def test_page_is_well_formed_and_loads_nothing_from_a_network() -> None:
    page, reader = make_page()
    assert reader.open == []
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "iframe"}
    assert [attrs["href"] for tag, attrs in reader.tags if tag == "a"] == ["llava/a.html"]
    sources = [attrs["src"] for _, attrs in reader.tags if "src" in attrs]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)


def test_what_comes_from_data_is_text() -> None:
    _, reader = make_page()
    assert reader.text.count('<script>alert("x")</script>') == 6  # headline, intro, note, caption, two duels
    heading = [attrs for tag, attrs in reader.tags if tag == "bdi"][-1]
    assert heading == {"lang": 'ar" onload="x'}
    assert "one <b>" in reader.text and "b" not in {tag for tag, _ in reader.tags}


def test_right_pictures_are_marked() -> None:
    _, reader = make_page()
    images = [attrs for tag, attrs in reader.tags if tag == "img" and "title" in attrs]
    assert [attrs.get("class") for attrs in images] == ["right", None]
    assert images[0]["title"] == images[0]["alt"] == 'a "b" <i>'


def test_cells() -> None:
    assert cell([0.1274]) == ".127"
    assert cell([1.0]) == "1.000"
    assert cell([0.1, 0.2, 0.3]) == ".200 ± .100"


def test_text_table_is_aligned() -> None:
    lines = as_text(TABLE).splitlines()
    assert lines[-1] == "what & why"
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[2].startswith("one <b>") and lines[3].endswith(".5")


def test_duels_are_drawn_and_counted() -> None:
    page, reader = make_page()
    assert "2 names in other languages, drawn at random: 1 won, 1 lost" in reader.text
    assert "100 → 10" in reader.text and "left: 50.0%; width: 50.0%" in page and "left: 0.0%" in page  # log scale
    assert [attrs["class"] for tag, attrs in reader.tags if str(attrs.get("class")).startswith("duel ")] == [
        "duel won",
        "duel lost",
    ]
