"""``llm2clip search``: the images of a data set that are nearest to a text, listed, as JSON, and as a page.

Shapes: Q texts, D projection dimension.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.downloads import default_download_folder
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption
from llm2clip_plugin.evaluate.command_line import NOTES_SHOWN, OpenedTower, dataset_name, on_all_ranks, open_tower
from llm2clip_plugin.evaluate.image_index import Hit, embed_images, folder_of_images, index_folder, nearest
from llm2clip_plugin.evaluate.in_memory_source import InMemorySource, Row
from llm2clip_plugin.evaluate.options.search import COMMAND, SearchConfig
from llm2clip_plugin.evaluate.teacher import Teacher
from llm2clip_plugin.outside.values import printable
from llm2clip_plugin.templates import page_style, render
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.thumbnails import thumbnail
from llm2clip_plugin.train.distributed import on_first_rank


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that was found for a text."""

    key: str  # of its sample
    score: float  # cosine
    picture: str | None  # data URI; None without a page, or if it can't be read any more


def main(argv: list[str]) -> int:
    """``llm2clip search TOWER DATA TEXT [TEXT ...]``."""
    config = COMMAND.parse(argv)
    return on_all_ranks(lambda all_ranks: search(config, all_ranks=all_ranks), lambda result: report(config, *result))


def search(
    config: SearchConfig, *, all_ranks: bool = False
) -> tuple[Source, list[BrokenSample], dict[str, list[Found]]]:
    """The source, its images that were left out, and for each text the nearest of the others.

    The texts are embedded first, so that a teacher that is not at hand is an error before the work on the images.
    """
    source = folder_of_images(config.data.path) or open_source(config.data)
    tower = open_tower(config.tower, config.device)
    folder = Path(config.cache) if config.cache else default_folder(config.tower)
    text_QD = on_first_rank(lambda: embed_texts(tower, config.text, folder, config.teacher))
    images = index_folder(tower, source, folder)
    parts, broken = embed_images(tower, source, images, batch=config.batch, workers=config.workers, all_ranks=all_ranks)
    hits = on_first_rank(lambda: nearest(parts, text_QD, config.top_k))
    found = [[_found(source, hit, picture=bool(config.output)) for hit in of_text] for of_text in hits]
    return source, broken, dict(zip(config.text, found, strict=True))


def default_folder(tower: str) -> Path:
    """``TOWER-search`` next to a tower directory; in the folder of downloads for a tower on the Hub."""
    path = Path(tower).expanduser()
    if path.is_dir():
        return path.absolute().with_name(f"{path.absolute().name}-search")
    return default_download_folder().parent / f"{tower.replace('/', '--')}-search"


def embed_texts(tower: OpenedTower, texts: Sequence[str], folder: Path, config: EncoderConfig) -> Tensor:
    """(Q, D): the texts by the tower's teacher; texts that ``folder`` already has need no LLM."""
    source = InMemorySource(
        f"texts-{sha256_text(canonical_json(list(texts)))[:12]}",
        folder,
        [Row(f"{number:05d}", None, (Caption(text, "text"),)) for number, text in enumerate(texts)],
    )
    teacher = Teacher(tower.dual.card, config, tower.device)
    cache = teacher.cache(source, folder / f"texts-{teacher.fingerprint[:12]}")
    rows = [cache.rows(source.name, number, row.captions, key=row.key) for number, row in enumerate(source.rows)]
    with torch.no_grad():
        return tower.dual.encode_text(torch.cat(rows)).cpu()


def _found(source: Source, hit: Hit, *, picture: bool) -> Found:
    try:
        record = source.record_with_image(hit.number)
        return Found(key=record.key, score=hit.score, picture=thumbnail(record.read_image()) if picture else None)
    except BrokenSample as error:
        return Found(key=error.key, score=hit.score, picture=None)


def report(config: SearchConfig, source: Source, broken: Sequence[BrokenSample], found: dict[str, list[Found]]) -> None:
    """Print the hits, and write the page and the JSON."""
    for text, images in found.items():
        print(f"\n{text}")
        for place, image in enumerate(images, 1):
            print(f"{place:4}  {image.score:6.3f}  {printable(image.key)}")
    print()
    for error in broken[:NOTES_SHOWN]:
        print(printable(f"left out: {error}"))
    if config.output:
        title = f"{dataset_name(config.tower)}: {dataset_name(config.data.path)}"
        intro = f"The nearest of {len(source):,} images, with their cosine similarity to the text."
        template = Path(__file__).with_name("search_page.html")
        _write(config.output, render(template, title=title, intro=intro, results=found, style=page_style()))
    if config.json:
        results = [
            {"text": text, "found": [{"key": image.key, "score": image.score} for image in images]}
            for text, images in found.items()
        ]
        body = {"tower": config.tower, "data": config.data.path, "results": results}
        _write(config.json, json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def _write(path: str, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
