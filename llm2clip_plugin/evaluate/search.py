"""``llm2clip search``: the images of a data set that are nearest to a text, listed, as JSON, and as a page.

One safetensors file holds the embeddings of a part of the images: ``image_ND`` (float16, normalized) and ``number_N``
(in the source). A rerun skips the parts that exist; the folder's name has a hash of the tower, the data and the
preprocessing.

Shapes: N images of a part, Q texts, D projection dimension.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.cache import source_digest
from llm2clip_plugin.data.pairs import eval_pairs
from llm2clip_plugin.data.remote import default_download_folder
from llm2clip_plugin.data.samples import BrokenSample, Caption
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.evaluate.config import SEARCH, SearchConfig
from llm2clip_plugin.evaluate.images import InMemorySource, Row, encode_images, image_files
from llm2clip_plugin.evaluate.opening import NOTES_SHOWN, OpenedTower, Teacher, dataset_name, on_all_ranks, open_tower
from llm2clip_plugin.files import ContractError, printable
from llm2clip_plugin.pages import page_style, render, thumbnail
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.train.distributed import barrier, gather_objects, group_of, on_first_rank, rank, world_size

FORMAT = 2  # of a part
PART = 4096  # images of a file, and what a stopped command embeds again at most


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    number: int  # in the source
    score: float  # cosine


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that was found for a text."""

    key: str  # of its sample
    score: float  # cosine
    picture: str | None  # data URI; None without a page, or if it can't be read any more


def main(argv: list[str]) -> int:
    """``llm2clip search TOWER DATA TEXT [TEXT ...]``."""
    config = SEARCH.parse(argv)
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
        record = source.record(hit.number, image=True)
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


def index_folder(tower: OpenedTower, source: Source, parent: Path) -> Path:
    """The folder below ``parent`` of a source's images, embedded by this tower."""
    card, stamps = tower.dual.card, [str(stamp) for stamp in source.stamps]
    data = [source_digest(source), source.config.images, source.config.image_field, stamps]
    images = dataclasses.asdict(tower.images)
    digest = sha256_text(canonical_json([card.weights_sha256, card.adapter_sha256, data, images, PART, FORMAT]))
    return parent / f"{source.name}-{digest[:12]}"


def embed_images(
    tower: OpenedTower, source: Source, folder: Path, *, batch: int, workers: int, all_ranks: bool = False
) -> tuple[list[Path], list[BrokenSample]]:
    """Embed the images of ``source`` whose part is not yet in ``folder``; all parts, and the images left out now.

    ``all_ranks``: every rank of the default process group calls this and embeds some of the parts.
    """
    group = group_of(all_ranks)
    starts = range(0, len(source), PART)
    parts = [folder / f"{part:05d}.safetensors" for part in range(len(starts))]
    missing = [(path, start) for path, start in zip(parts, starts, strict=True) if not path.is_file()]
    broken: list[BrokenSample] = []
    show, alone = rank(group) == 0, group_of(False)  # each rank has parts of its own
    for path, start in missing[rank(group) :: world_size(group)]:
        some = range(start, min(start + PART, len(source)))
        batches = eval_pairs(source, None, tower.images, batch=batch, kinds=None, indices=some, workers=workers)
        found = encode_images(tower.dual.encode_image, batches, tower.images, tower.device, alone, show=show)
        broken += found.broken
        vectors = [torch.empty(0, tower.dual.card.projection_dim), *found.vectors]
        tensors = {"image_ND": torch.cat(vectors).half(), "number_N": torch.tensor(found.numbers).long()}
        with atomic_file(path) as temporary:
            save_file(tensors, str(temporary))
    if all_ranks:
        barrier()
    return parts, [error for of_rank in gather_objects(broken, group) for error in of_rank]


def nearest(parts: Sequence[Path], text_QD: Tensor, count: int) -> list[list[Hit]]:
    """For each text the ``count`` nearest images, best first; a part at a time is in memory.

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
    return [
        [Hit(number, score) for number, score in zip(numbers, scores, strict=True)]
        for numbers, scores in zip(number_Qk.tolist(), score_Qk.tolist(), strict=True)
    ]


def folder_of_images(path: str) -> InMemorySource | None:
    """A folder of image files, at any depth, as a source without captions; None if ``path`` is not one."""
    root = Path(path)
    if not root.is_dir() or any(root.glob("*.tar")) or not (files := image_files(root)):
        return None
    stamps = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{root.resolve().name}-{sha256_text(canonical_json(stamps))[:12]}"
    return InMemorySource(name, root, [Row(stamp[0], file) for stamp, file in zip(stamps, files, strict=True)])
