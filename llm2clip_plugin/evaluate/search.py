"""``llm2clip search``: the images of a data set that are nearest to a text, listed, as JSON, and as a page.

One safetensors file holds the embeddings of a part of the images: ``image_ND`` (float16, normalized) and ``number_N``
(in the source). A rerun skips the parts that exist; the folder's name has a hash of the tower, the data and the
preprocessing.

Shapes: N images of a part, Q texts, D projection dimension.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.console import page_style, render, thumbnail
from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.cache import source_digest
from llm2clip_plugin.data.remote import default_download_folder
from llm2clip_plugin.data.samples import BrokenSample, Caption
from llm2clip_plugin.data.sources import Source, open_source
from llm2clip_plugin.evaluate.config import SEARCH, SearchConfig
from llm2clip_plugin.evaluate.opening import (
    NOTES_SHOWN,
    InMemorySource,
    OpenedTower,
    Row,
    dataset_name,
    encode_images,
    image_files,
    on_all_ranks,
    open_tower,
)
from llm2clip_plugin.files import ContractError, printable
from llm2clip_plugin.train.distributed import barrier, gather_objects, group_of, on_first_rank, rank, world_size

FORMAT = 2  # of a part
PART = 4096  # images of a file, and what a stopped command embeds again at most


Found = dict[str, Any]  # key of its sample; score: cosine; picture: data URI, None without a page or if unreadable


def main(argv: list[str]) -> int:
    """``llm2clip search TOWER DATA TEXT [TEXT ...]``."""
    config = SEARCH.parse(argv)
    return on_all_ranks(partial(search, config), lambda result: report(config, *result))


def search(config: SearchConfig, all_ranks: bool) -> tuple[Source, list[BrokenSample], dict[str, list[Found]]]:
    """The source, its images that were left out, and for each text the nearest of the others.

    The texts are embedded first, so that a teacher that is not at hand is an error before the work on the images.
    """
    source = folder_of_images(config.data.path) or open_source(config.data)
    tower = open_tower(config.tower, config.device, config.teacher)
    if config.cache:
        folder = Path(config.cache)
    elif (path := Path(config.tower).expanduser()).is_dir():
        folder = path.absolute().with_name(f"{path.absolute().name}-search")
    else:
        folder = default_download_folder().parent / f"{config.tower.replace('/', '--')}-search"
    text_QD = on_first_rank(lambda: embed_texts(tower, config.text, folder))
    parts, broken = embed_images(config, tower, source, folder, all_ranks)
    hits = on_first_rank(lambda: nearest(parts, text_QD, config.top_k))
    found = [[_found(source, *hit, picture=bool(config.output)) for hit in of_text] for of_text in hits]
    return source, broken, dict(zip(config.text, found, strict=True))


def embed_texts(tower: OpenedTower, texts: Sequence[str], folder: Path) -> Tensor:
    """(Q, D): the texts by the tower's teacher; texts that ``folder`` already has need no LLM."""
    rows = [Row(f"{number:05d}", None, (Caption(text, "text"),)) for number, text in enumerate(texts)]
    source = InMemorySource(f"texts-{sha256_text(canonical_json(list(texts)))[:12]}", folder, rows)
    cache = tower.cache(source, folder / f"texts-{tower.teacher.fingerprint[:12]}")
    embedded = [cache.rows(source.name, number, row.captions, key=row.key) for number, row in enumerate(rows)]
    with torch.no_grad():
        return tower.dual.encode_text(torch.cat(embedded)).cpu()


def _found(source: Source, number: int, score: float, *, picture: bool) -> Found:
    try:
        record = source.record(number)
        return {"key": record.key, "score": score, "picture": thumbnail(record.read_image()) if picture else None}
    except BrokenSample as error:
        return {"key": error.key, "score": score, "picture": None}


def report(config: SearchConfig, source: Source, broken: Sequence[BrokenSample], found: dict[str, list[Found]]) -> None:
    """Print the hits, and write the page and the JSON."""
    for text, images in found.items():
        print(f"\n{text}")
        for place, image in enumerate(images, 1):
            print(f"{place:4}  {image['score']:6.3f}  {printable(image['key'])}")
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
            {"text": text, "found": [{"key": image["key"], "score": image["score"]} for image in images]}
            for text, images in found.items()
        ]
        body = {"tower": config.tower, "data": config.data.path, "results": results}
        _write(config.json, json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def _write(path: str, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def embed_images(
    config: SearchConfig, tower: OpenedTower, source: Source, parent: Path, all_ranks: bool
) -> tuple[list[Path], list[BrokenSample]]:
    """Embed the parts of ``source`` that are not yet below ``parent``; all parts, and the images left out now."""
    card, stamps = tower.dual.card, [str(stamp) for stamp in source.stamps]
    data = [source_digest(source), source.config.images, source.config.image_field, stamps]
    images = dataclasses.asdict(tower.images)
    digest = sha256_text(canonical_json([card.weights_sha256, card.adapter_sha256, data, images, PART, FORMAT]))
    group, starts = group_of(all_ranks), range(0, len(source), PART)
    parts = [parent / f"{source.name}-{digest[:12]}" / f"{part:05d}.safetensors" for part in range(len(starts))]
    missing = [(path, start) for path, start in zip(parts, starts, strict=True) if not path.is_file()]
    broken: list[BrokenSample] = []
    for path, start in missing[rank(group) :: world_size(group)]:
        found = encode_images(
            tower.dual.encode_image,
            source,
            tower.images,
            tower.device,
            batch=config.batch,
            workers=config.workers,
            indices=range(start, min(start + PART, len(source))),
            quiet=rank(group) != 0,
        )
        broken += found.broken
        vectors = [torch.empty(0, card.projection_dim), *found.vectors]
        tensors = {"image_ND": torch.cat(vectors).half(), "number_N": torch.tensor(found.numbers).long()}
        with atomic_file(path) as temporary:
            save_file(tensors, str(temporary))
    if all_ranks:
        barrier()
    return parts, [error for of_rank in gather_objects(broken, group) for error in of_rank]


def nearest(parts: Sequence[Path], text_QD: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For each text (number, cosine) of the ``count`` nearest images, best first; a part at a time is in memory.

    Raises ContractError for a damaged part, ValueError if no image is readable.
    """
    score_Qk, number_Qk = torch.empty(len(text_QD), 0), torch.empty(len(text_QD), 0, dtype=torch.int64)
    for path in parts:
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ContractError(f"{path} is damaged ({error}); delete it and rerun the same command") from error
        scores = torch.cat((score_Qk, text_QD.float().cpu() @ tensors["image_ND"].float().T), dim=1)
        numbers = torch.cat((number_Qk, tensors["number_N"].expand(len(text_QD), -1)), dim=1)
        score_Qk, chosen = scores.topk(min(count, scores.shape[1]), dim=1)
        number_Qk = numbers.gather(1, chosen)
    if not score_Qk.shape[1]:
        raise ValueError("the data has no readable images")
    return [list(zip(*of_text, strict=True)) for of_text in zip(number_Qk.tolist(), score_Qk.tolist(), strict=True)]


def folder_of_images(path: str) -> InMemorySource | None:
    """A folder of image files, at any depth, as a source without captions; None if ``path`` is not one."""
    root = Path(path)
    if not root.is_dir() or any(root.glob("*.tar")) or not (files := image_files(root)):
        return None
    stamps = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{root.resolve().name}-{sha256_text(canonical_json(stamps))[:12]}"
    return InMemorySource(name, root, [Row(stamp[0], file) for stamp, file in zip(stamps, files, strict=True)])
