"""The page of ``llm2clip run``: scores before and after, queries won and lost with pictures, the
commands."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split import outputs
from llm2clip_plugin.evaluate.commands import measure_pairs
from llm2clip_plugin.evaluate.config import EvaluateConfig
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.pages import page_style, render, thumbnail
from llm2clip_plugin.stages.pipeline_config import PipelineConfig
from llm2clip_plugin.stages.rerun import Stage

# folders of the two towers' trainings
BEFORE = "before"
AFTER = "after"
SIDES = (BEFORE, AFTER)
PAGE = "index.html"  # in the run's folder
SHOWN = 5  # pictures that each tower finds first
QUERIES = 24  # validation captions that the page shows


def held_out_config(
    config: PipelineConfig, source: Source, side: str = "validation"
) -> SourceConfig:
    """How a side of the run's split is read."""
    values = {item.name: getattr(config, item.name) for item in fields(SourceConfig)}
    images = source.images_folder if isinstance(source, RowSource) else ""
    path = outputs(source, Path(config.output) / "data")[side]
    return SourceConfig(**{**values, "path": str(path), "images": images})


def write_page(
    config: PipelineConfig,
    source: Source,
    stages: Sequence[Stage],
    seconds: Mapping[str, float],
) -> Path:
    """Write OUTPUT/index.html; returns its path."""
    out = Path(config.output)
    held_out = held_out_config(config, source)
    cache = str(out / "embeddings" / "validation")
    towers = {
        side: EvaluateConfig(
            tower=str(out / side / "tower"), data=held_out, cache=cache
        )
        for side in SIDES
    }
    pairs = {side: measure_pairs(tower)[1].pairs for side, tower in towers.items()}
    folders = [stage.output for stage in stages if stage.words[1] == "compare"]
    compared = [folder / "compare.json" for folder in folders if folder is not None]
    rows = []
    for path in compared:
        rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
    inputs = (config.path, config.tower, config.llm)
    comparisons = [path.relative_to(out).with_suffix(".html") for path in compared]
    queries = draw(open_source(held_out), pairs)
    # places that the right picture has gained
    gains = [query["place"][BEFORE] - query["place"][AFTER] for query in queries]
    page = out / PAGE
    with atomic_file(page) as temporary:
        html = render(
            Path(__file__).with_name("page.html"),
            title=" · ".join(Path(path).name for path in inputs),
            style=page_style(),
            rows=rows,
            comparisons=comparisons,
            images=len(pairs[BEFORE].keys),
            queries=queries,
            won=sum(gain > 0 for gain in gains),
            lost=sum(gain < 0 for gain in gains),
            stages=[listed(stage, seconds) for stage in stages],
        )
        temporary.write_text(html, encoding="utf-8")
    return page


def listed(stage: Stage, seconds: Mapping[str, float]) -> tuple[str, float, str]:
    """Name, seconds and command of a stage, as a shell reads it."""
    return stage.name, seconds.get(stage.name, 0.0), shlex.join(stage.words)


def draw(source: Source, pairs: dict[str, EmbeddedPairs]) -> list[dict[str, Any]]:
    """Queries drawn from all validation captions, the same ones at every call: text and picture (a
    data URI), and by side the place of the right picture, and the first ones that are found, each
    with whether it is right."""
    first = pairs[BEFORE]
    captions = len(first.captions)
    drawn = random.Random(0).sample(range(captions), min(QUERIES, captions))
    chosen = sorted(drawn)
    # side -> (Q, N): the images for each of these captions, the most similar first
    orders: dict[str, Any] = {}
    for side, embedded in pairs.items():
        image_ND = F.normalize(embedded.image_ND, dim=1)
        text_QD = F.normalize(embedded.text_MD[chosen], dim=1)
        cosine_QN = text_QD @ image_ND.T
        orders[side] = cosine_QN.argsort(dim=1, descending=True, stable=True)

    def picture(image: int) -> str | None:
        with suppress(BrokenSample):
            return thumbnail(source[first.numbers[image]].read_image())

    queries = []
    for row, caption in enumerate(chosen):
        right = int(first.owner_M[caption])
        query: dict[str, Any] = {
            "text": first.captions[caption].text,
            "picture": picture(right),
            "place": {},
            "found": {},
        }
        for side, order_QN in orders.items():
            images = order_QN[row].tolist()
            query["place"][side] = images.index(right) + 1
            query["found"][side] = [
                (picture(image), image == right) for image in images[:SHOWN]
            ]
        queries.append(query)
    return queries
