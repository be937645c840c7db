"""Shards of Open Clip Art: families that look alike stay together, held-out emoji and collections are left out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import shards
from PIL import Image

openclipart = pytest.importorskip("openclipart")
SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="40pt" height="20pt"><metadata>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject></rdf:RDF></metadata>{body}</svg>"""
LADDER = '<path d="M2 2 L30 2 L{x} 18 Z" fill="{fill}"/>'


def add_drawing(root: Path, name: str, title: str, body: str, keywords: tuple[str, ...] = ("hash", "wood", "Tool")):
    path = root / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    path.write_text(SVG.format(title=title, items=items, body=body), encoding="utf-8")


def test_shards_are_made_of_clip_art(tmp_path) -> None:
    root = tmp_path / "deb" / "usr/share/openclipart/svg"  # as dpkg-deb -x unpacks it
    add_drawing(root, "tools/ladder", "Old_Ladder 01", LADDER.format(x=30, fill="red"))
    add_drawing(root, "tools/ladder2", "Steps", LADDER.format(x=2, fill="blue"))  # the same, mirrored, in another color
    add_drawing(root, "tools/saw", "Saw", '<circle cx="10" cy="10" r="9"/>')
    add_drawing(root, "tools/blank", "Nothing", "")
    add_drawing(root, "tools/few", "Rake", LADDER.format(x=9, fill="red"), ("hash", "rake"))
    add_drawing(root, "flags/flag", "Flag", LADDER.format(x=9, fill="red"))
    add_drawing(root, "animals/owl", "Panda", LADDER.format(x=9, fill="red"))  # an emoji held out
    add_drawing(root, "animals/crow", "Old crow", LADDER.format(x=20, fill="red"), ("Toothbrush", "black"))
    for number in range(openclipart.COLLECTION + 1):
        add_drawing(root, f"set/{number}", "Nice icon theme", LADDER.format(x=number, fill="red"))
    openclipart.prepare(tmp_path / "out", tmp_path / "deb", 32)
    found = {}
    for split in ("train", "validation"):
        for key, png, about in shards.read_tar(tmp_path / "out" / f"{split}-openclipart.tar"):
            found[key] = about
            assert about["split"] == split and Image.open(io.BytesIO(png)).size == (32, 32)
    assert set(found) == {"tools-ladder", "tools-ladder2", "tools-saw"}
    assert found["tools-ladder"]["family"] == found["tools-ladder2"]["family"] != found["tools-saw"]["family"]
    texts = {caption["kind"]: caption["text"] for caption in found["tools-ladder"]["captions"]}
    assert texts == {"short": "old ladder", "long": "old ladder, tools, wood, tool", "keywords": "wood, tool"}
    with pytest.raises(ValueError, match="SVG"):
        openclipart.prepare(tmp_path / "none", tmp_path / "out", 32)
