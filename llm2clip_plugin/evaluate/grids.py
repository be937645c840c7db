"""Pictures that W&B and TensorBoard show: images with their captions, the best and the worst
retrievals.

Shapes: Q queries, N images, M captions, D projection dimension.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import suppress

import torch
from PIL import Image, ImageDraw, ImageOps

from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.retrieval import ALL, RetrievalReport
from llm2clip_plugin.pictures import BrokenImage, load, open_header

SHOWN = 4  # images of a grid
# pixels of an image in a grid; letters of a line below it, lines of a caption
SIDE = 224
LINE = 36
LINES = 6

Picture = tuple[Image.Image, str]  # and its text


def draw_retrievals(report: RetrievalReport, source: Source) -> dict[str, Picture]:
    """``eval/best`` and ``eval/worst``: grids of the images whose caption is ranked first, or last,
    each with its first caption and the nearest of all; images of equal rank by the cosine of the
    two."""
    pairs = report.pairs
    ranks, image_Q = report.parts[ALL].sides["i2t"]
    caption_Q = torch.searchsorted(pairs.owner_M, image_Q)  # each image's first
    image_QD = pairs.image_ND[image_Q]
    text_QD = pairs.text_MD[caption_Q]
    cosine_Q = (image_QD * text_QD).sum(1)
    columns = [
        ranks.higher_Q.tolist(),
        (-cosine_Q).tolist(),
        image_Q.tolist(),
        caption_Q.tolist(),
    ]
    queries = sorted(zip(*columns, strict=True))
    others = queries[SHOWN:]
    others.reverse()
    selected = {"best": queries[:SHOWN], "worst": others[:SHOWN]}
    grids: dict[str, Picture] = {}
    for name, rows in selected.items():
        if not rows:
            continue
        places = [(image, caption, higher + 1) for higher, _, image, caption in rows]
        grids[f"eval/{name}"] = _draw_grid(pairs, source, places)
    return grids


def _draw_grid(
    pairs: EmbeddedPairs, source: Source, queries: Sequence[tuple[int, int, int]]
) -> Picture:
    """Images side by side, each above its text. A query: image, its caption, and that one's
    place."""
    grid = Image.new("RGB", (SIDE * len(queries), 2 * SIDE), "white")
    texts: list[str] = []
    for column, (image, caption, rank) in enumerate(queries):
        left = column * SIDE
        scores_M = pairs.text_MD @ pairs.image_ND[image]
        nearest = int(scores_M.argmax())
        own_text = pairs.captions[caption].text
        nearest_text = pairs.captions[nearest].text
        text = f"place {rank}: {own_text}\nfirst: {nearest_text}"
        texts.append(text)
        with suppress(BrokenSample, BrokenImage):
            sample = source[pairs.numbers[image]]
            picture = load(open_header(sample.read_image()))
            small = ImageOps.contain(picture, (SIDE, SIDE))
            grid.paste(small, (left, 0))
        lines: list[str] = []
        for part in text.split("\n"):
            wrapped = textwrap.wrap(part, LINE)
            lines += wrapped[:LINES]
        below = (left + 4, SIDE + 4)
        ImageDraw.Draw(grid).multiline_text(below, "\n".join(lines), "black")
    return grid, "\n".join(texts)
