#!/usr/bin/env python3
"""README.md's picture: five names in five languages, and the pictures that the quickstart's tower
finds for them.

    readme_picture.py quickstart-output/default/found.json --output docs/images

Writes found-light.png and found-dark.png. Which names are shown, found.py decides: of the names
that it draws, the first in each of five languages whose right picture is among the first five; the
picture says how many were drawn. Needs resvg-py, which the quickstart installs, and fonts of the
languages.
"""

import argparse
import io
import json
import sys
import textwrap
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

WIDTH = 880
ROW = 132  # height
TOP = 20
LEFT = 232  # where the pictures start
STEP = 128  # from picture to picture
SIZE = 76  # of a picture
SCALE = 2  # pixels of the file for each of the drawing
COLORS = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1c2330",
        "dim": "#5b6472",
        "line": "#e3e6ea",
        "good": "#2e7d32",
    },
    "dark": {
        "paper": "#0d1117",
        "ink": "#e6e8ec",
        "dim": "#98a2b0",
        "line": "#2c333d",
        "good": "#7cc47f",
    },
}
FONT = "Noto Sans, DejaVu Sans, sans-serif"
FONTS = {  # of languages that it has no letters of
    "zh": "Noto Sans CJK SC",
    "ja": "Noto Sans CJK JP",
    "ar": "Noto Sans Arabic",
    "hi": "Noto Sans Devanagari",
}
PALETTE = 256  # colors of the file


def text(x: float, y: float, value: str, color: str, size: int, more: str = "") -> str:
    """A line of text; ``more``: other attributes."""
    font = "" if "font-family" in more else f'font-family="{FONT}"'
    style = f'fill="{color}" font-size="{size}" {font} {more}'
    return f'<text x="{x}" y="{y}" {style}>{escape(value)}</text>'


def picture(x: float, y: float, uri: str, *, frame: str) -> str:
    """A drawing on white; ``frame``: its color, "" for none."""
    box = f'x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" rx="8"'
    inner = SIZE - 8
    inner_box = f'x="{x + 4}" y="{y + 4}" width="{inner}" height="{inner}"'
    parts = [f'<rect {box} fill="#ffffff"/>']
    parts.append(f'<image {inner_box} href="{uri}"/>')
    if frame:
        parts.append(f'<rect {box} fill="none" stroke="{frame}" stroke-width="4"/>')
    return "".join(parts)


def row(
    query: Mapping[str, Any],
    retrieval: Mapping[str, Any],
    y: float,
    color: Mapping[str, str],
) -> list[str]:
    """A name, and the pictures found for it with their names."""
    names = retrieval["names"]
    about = query["language"]
    if query["code"] != "en":
        about += f": {names[query['concept']]}"
    after = query["after"]
    before = query["before"]
    font = FONTS.get(query["code"], FONT)
    bold = f'font-weight="700" font-family="{font}"'
    ranks = f"number {after['rank']}; before training {before['rank']}"
    parts = [
        text(20, y + 34, query["text"], color["ink"], 21, bold),
        text(20, y + 57, about, color["dim"], 13),
        text(20, y + 77, ranks, color["dim"], 13),
    ]
    for position, concept in enumerate(after["first"]):
        x = LEFT + position * STEP
        is_right = concept == query["concept"]
        frame = color["good"] if is_right else ""
        uri = retrieval["pictures"][query["style"]][concept]
        parts.append(picture(x, y, uri, frame=frame))
        ink = color["good"] if is_right else color["dim"]
        middle = x + SIZE / 2
        lines = textwrap.wrap(names[concept], 19)[:2]
        for number, line in enumerate(lines):
            below = y + SIZE + 17 + 14 * number
            parts.append(text(middle, below, line, ink, 12, 'text-anchor="middle"'))
    return parts


def draw(retrieval: Mapping[str, Any], color: Mapping[str, str]) -> str:
    """The picture, as SVG."""
    figure = retrieval["figure"]
    queries = figure["queries"]
    these = "these"
    if figure["found"] != len(queries):
        these = "these are of five languages"
    lines = [
        f"Of the first {figure['drawn']} names drawn at random, {figure['found']} find their "
        f"drawing among the first five of {retrieval['images']}: {these}. "
        "The right drawing has a frame.",
        "Training saw none of these drawings, and captions in English only. "
        "Drawings: Noto Emoji (Google, Apache-2.0),",
        "Twemoji (Twitter, Inc. and other contributors, CC-BY 4.0), Fluent Emoji (Microsoft, MIT).",
    ]
    height = TOP + ROW * len(queries) + 66
    parts = [f'<rect width="{WIDTH}" height="{height}" fill="{color["paper"]}"/>']
    for number, query in enumerate(queries):
        y = TOP + ROW * number
        parts += row(query, retrieval, y, color)
        parts.append(
            f'<path d="M20 {y + ROW - 10}H{WIDTH - 20}" stroke="{color["line"]}"/>'
        )
    for number, line in enumerate(lines):
        parts.append(text(20, height - 48 + 18 * number, line, color["dim"], 12))
    body = "\n".join(parts)
    size = f'width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("found", type=Path, help="found.json of a quickstart")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/images"), help="folder to write"
    )
    options = parser.parse_args()
    import resvg_py
    from PIL import Image

    retrieval = json.loads(options.found.read_text(encoding="utf-8"))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, color in COLORS.items():
        drawn = resvg_py.svg_to_bytes(svg_string=draw(retrieval, color), zoom=SCALE)
        drawing = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
        drawing = drawing.quantize(PALETTE, dither=Image.Dither.NONE)
        drawing.save(options.output / f"found-{name}.png", optimize=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
