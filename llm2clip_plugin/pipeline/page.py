"""The page about a run: scores with their intervals, and validation captions drawn at random."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split.writing import outputs
from llm2clip_plugin.evaluate.command import measure
from llm2clip_plugin.evaluate.embedded_pairs import EmbeddedPairs
from llm2clip_plugin.evaluate.options.retrieval import EvaluateConfig
from llm2clip_plugin.pipeline.options import PipelineConfig
from llm2clip_plugin.pipeline.stages import AFTER, BEFORE, SIDES, Stage
from llm2clip_plugin.templates import page_style, render
from llm2clip_plugin.thumbnails import thumbnail

SHOWN = 5  # pictures that each tower finds first


@dataclass(frozen=True, kw_only=True)
class Query:
    """A validation caption, and where each tower finds its picture."""

    text: str
    picture: str | None  # data URI
    place: dict[str, int]  # side -> rank of the right picture, 1: first
    found: dict[str, list[tuple[str | None, bool]]]  # side -> (data URI, whether it is right) of the first ones


def write_page(config: PipelineConfig, source: Source, stages: list[Stage], seconds: dict[str, float]) -> Path:
    """Write OUTPUT/index.html; returns its path."""
    out = Path(config.output)
    values = {item.name: getattr(config, item.name) for item in fields(SourceConfig)}
    images = source.images_folder if isinstance(source, RowSource) else ""
    held_out = SourceConfig(**{**values, "path": str(outputs(source, out / "data")["validation"]), "images": images})
    pairs = {side: measure(EvaluateConfig(tower=str(out / side / "tower"), data=held_out))[1].pairs for side in SIDES}
    compared = [stage.result for stage in stages if stage.result.name == "compare.json"]
    queries = draw(open_source(held_out), pairs, config.queries)
    page = out / "index.html"
    with atomic_file(page) as temporary:
        html = render(
            Path(__file__).with_name("page.html"),
            title=" · ".join(Path(place).name for place in (config.path, config.tower, config.llm)),
            style=page_style(),
            rows=[row for path in compared for row in json.loads(path.read_text(encoding="utf-8"))["rows"]],
            comparisons=[path.relative_to(out).with_suffix(".html") for path in compared],
            images=len(pairs[BEFORE].keys),
            queries=queries,
            won=sum(query.place[AFTER] < query.place[BEFORE] for query in queries),
            lost=sum(query.place[AFTER] > query.place[BEFORE] for query in queries),
            stages=[(stage, seconds.get(stage.name, 0.0)) for stage in stages],
        )
        temporary.write_text(html, encoding="utf-8")
    return page


def draw(source: Source, pairs: dict[str, EmbeddedPairs], count: int) -> list[Query]:
    """Queries drawn from all validation captions, the same ones at every call."""
    first = pairs[BEFORE]
    number = {source.key(place): place for place in range(len(source))}
    chosen = sorted(random.Random(0).sample(range(len(first.captions)), min(count, len(first.captions))))
    orders = {side: ranked(each, chosen) for side, each in pairs.items()}

    def picture(image: int) -> str | None:
        try:
            return thumbnail(source.with_image(number[first.keys[image]]).read_image())
        except BrokenSample:
            return None

    queries: list[Query] = []
    for row, caption in enumerate(chosen):
        right = int(first.owner_M[caption])
        tops: dict[str, Any] = {side: order_QN[row].tolist() for side, order_QN in orders.items()}
        queries.append(
            Query(
                text=first.captions[caption].text,
                picture=picture(right),
                place={side: top.index(right) + 1 for side, top in tops.items()},
                found={side: [(picture(image), image == right) for image in top[:SHOWN]] for side, top in tops.items()},
            )
        )
    return queries


def ranked(pairs: EmbeddedPairs, captions: list[int]) -> torch.Tensor:
    """(Q, N) int64: the images for each of these captions, the most similar first."""
    image_ND, text_QD = (torch.nn.functional.normalize(x, dim=1) for x in (pairs.image_ND, pairs.text_MD[captions]))
    return (text_QD @ image_ND.T).argsort(dim=1, descending=True, stable=True)
