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

from llm2clip_plugin.data.samples import BrokenImage, BrokenSample, load, open_header
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.retrieval import ALL, RetrievalReport

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
    cosine_Q = (pairs.image_ND[image_Q] * pairs.text_MD[caption_Q]).sum(1)
    columns = (ranks.higher_Q, -cosine_Q, image_Q, caption_Q)
    queries = sorted(zip(*(column.tolist() for column in columns), strict=True))
    worst_first = queries[SHOWN:][::-1]
    grids: dict[str, Picture] = {}
    for name, selected in (("best", queries[:SHOWN]), ("worst", worst_first[:SHOWN])):
        if selected:
            places = [(image, caption, higher + 1) for higher, _, image, caption in selected]
            grids[f"eval/{name}"] = _draw_grid(report.pairs, source, places)
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
        nearest = int((pairs.text_MD @ pairs.image_ND[image]).argmax())
        caption_line = f"place {rank}: {pairs.captions[caption].text}"
        texts.append(f"{caption_line}\nfirst: {pairs.captions[nearest].text}")
        with suppress(BrokenSample, BrokenImage):
            picture = load(open_header(source[pairs.numbers[image]].read_image()))
            grid.paste(ImageOps.contain(picture, (SIDE, SIDE)), (left, 0))
        lines: list[str] = []
        for part in texts[-1].split("\n"):
            lines += textwrap.wrap(part, LINE)[:LINES]
        ImageDraw.Draw(grid).multiline_text((left + 4, SIDE + 4), "\n".join(lines), "black")
    return grid, "\n".join(texts)
