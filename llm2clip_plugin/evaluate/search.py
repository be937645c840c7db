"""``llm2clip search``: the images of a data set that are nearest to a text, listed and as a page.

One safetensors file holds the embeddings of a part of the images: ``image_ND`` (float16,
normalized) and ``number_N`` (in the source), and in its metadata the images left out. A rerun skips
the parts that exist; the folder's name has a hash of the tower, the data, sizes and times of the
image files, and the preprocessing.

Shapes: N images of a part, Q texts, D projection dimension.
"""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.data.cache import source_digest
from llm2clip_plugin.data.remote import computed_folder, public_name
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import Source, open_source
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.evaluate import commands
from llm2clip_plugin.evaluate.config import SEARCH, SearchConfig
from llm2clip_plugin.evaluate.features import encode_images
from llm2clip_plugin.evaluate.suites import InMemorySource, Row, image_files
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.outside import printable
from llm2clip_plugin.pages import page_style, render, thumbnail
from llm2clip_plugin.safetensors_header import read_header
from llm2clip_plugin.train.distributed import group_of, on_first_rank, rank

FIX = "delete it and rerun the same command"
# of a file's metadata: shard, key and reason of each image that was left out, as JSON
LEFT_OUT = "left_out"
PART = 16384  # images of a file, and what a stopped command embeds again at most

# of each text (number in the source, cosine), best first
Hits = list[list[tuple[int, float]]]


def main(argv: list[str]) -> int:
    """``llm2clip search TOWER DATA TEXT [TEXT ...]``."""
    config = SEARCH.parse(argv)
    return commands.on_all_ranks(
        partial(search, config), lambda result: report(config, *result)
    )


def search(
    config: SearchConfig, all_ranks: bool
) -> tuple[Source, list[BrokenSample], Hits]:
    """The source, its images that were left out, and for each text the nearest of the others.

    The texts are embedded first, so that a teacher that is not at hand is an error before the work
    on the images.
    """
    source = folder_of_images(config.data.path) or open_source(config.data)
    tower = commands.open_tower(config.tower, config.device, config.teacher)

    def embed_texts() -> Tensor:
        embedding_QW = tower.teacher.encoder.encode(config.text)
        return tower.dual.encode_text(embedding_QW).cpu()

    with torch.no_grad():
        text_QD = on_first_rank(embed_texts)
    parts, broken = embed_images(config, tower, source, all_ranks)
    hits = on_first_rank(lambda: nearest(parts, text_QD, config.top_k))
    return source, broken, hits


def report(
    config: SearchConfig, source: Source, broken: Sequence[BrokenSample], hits: Hits
) -> None:
    """Print the hits, and write the page."""
    results = {}
    for text, of_text in zip(config.text, hits, strict=True):
        print(f"\n{text}")
        results[text] = []
        for position, (number, score) in enumerate(of_text, 1):
            record = source.record(number)
            print(f"{position:4}  {score:6.3f}  {printable(record.key)}")
            picture = None
            with suppress(BrokenSample):  # embedded before it was deleted
                picture = thumbnail(record.read_image()) if config.output else None
            results[text].append(
                {"key": record.key, "score": score, "picture": picture}
            )
    print()
    for error in broken[: commands.NOTES_SHOWN]:
        print(printable(f"left out: {error}"))
    if config.output:
        title = f"{public_name(config.tower)}: {public_name(config.data.path)}"
        intro = f"The nearest of {len(source):,} images, with their cosine similarity to the text."
        template = Path(__file__).with_name("search_page.html")
        with atomic_file(config.output) as temporary:
            page = render(
                template, title=title, intro=intro, results=results, style=page_style()
            )
            temporary.write_text(page, encoding="utf-8")
        print(f"wrote {config.output}")


def embed_images(
    config: SearchConfig, tower: commands.OpenedTower, source: Source, all_ranks: bool
) -> tuple[list[Path], list[BrokenSample]]:
    """Embed the parts of ``source`` that are not there yet, written by rank 0; all parts, and the
    images left out."""
    card = tower.dual.card
    folder = Path(on_first_rank(lambda: str(embeddings_folder(config, tower, source))))
    starts = range(0, len(source), PART)
    parts = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]

    def missing() -> list[int]:
        return [number for number, path in enumerate(parts) if not path.is_file()]

    for part in on_first_rank(missing):
        start = starts[part]
        encoded = encode_images(
            tower.dual.encode_image,
            source,
            tower.images,
            tower.device,
            indices=range(start, min(start + PART, len(source))),
            batch=config.batch,
            workers=config.workers,
            all_ranks=all_ranks,
        )
        if rank(group_of(all_ranks)) == 0:
            vectors = [torch.empty(0, card.projection_dim), *encoded.vectors]
            tensors = {
                "image_ND": torch.cat(vectors).half(),
                "number_N": torch.tensor(encoded.numbers).long(),
            }
            left_out = [
                [error.shard, error.key, error.reason] for error in encoded.broken
            ]
            with atomic_file(parts[part]) as temporary:
                save_file(tensors, str(temporary), {LEFT_OUT: json.dumps(left_out)})
    broken = [
        BrokenSample(*fields) for fields in on_first_rank(lambda: left_out_of(parts))
    ]
    return parts, broken


def left_out_of(parts: Sequence[Path]) -> list[list[str]]:
    """Shard, key and reason of each image that was left out when the parts were embedded."""
    left_out: list[list[str]] = []
    for path in parts:
        left_out += json.loads(read_header(path, fix=FIX).metadata[LEFT_OUT])
    return left_out


def embeddings_folder(
    config: SearchConfig, tower: commands.OpenedTower, source: Source
) -> Path:
    """Where a source's embeddings lie: its name has a hash of all that decides them."""
    card = tower.dual.card
    stamps = [str(stamp) for stamp in source.stamps]
    data = [
        source_digest(source),
        source.config.images,
        source.config.image_field,
        stamps,
        source.file_stamps(),
    ]
    images = dataclasses.asdict(tower.images)
    identity = [card.weights_sha256, card.adapter_sha256, data, images, PART]
    digest = sha256_text(canonical_json(identity))
    parent = computed_folder("search")
    if config.cache:
        parent = Path(config.cache)
    return parent / f"{source.name}-{digest[:12]}"


def nearest(parts: Sequence[Path], text_QD: Tensor, count: int) -> Hits:
    """The ``count`` nearest images of each text; a part at a time is in memory.

    Raises ContractError for a damaged part, ValueError if no image is readable.
    """
    score_Qk = torch.empty(len(text_QD), 0)
    number_Qk = torch.empty(len(text_QD), 0, dtype=torch.int64)
    for path in parts:
        with errors_about(path, fix=FIX):
            tensors = load_file(path)
        score_QN = text_QD.float() @ tensors["image_ND"].float().T
        number_QN = tensors["number_N"].expand(len(text_QD), -1)
        scores = torch.cat((score_Qk, score_QN), dim=1)
        numbers = torch.cat((number_Qk, number_QN), dim=1)
        score_Qk, chosen = scores.topk(min(count, scores.shape[1]), dim=1)
        number_Qk = numbers.gather(1, chosen)
    if not score_Qk.shape[1]:
        raise ValueError("the data has no readable images")
    hits: Hits = []
    for numbers_k, scores_k in zip(number_Qk.tolist(), score_Qk.tolist(), strict=True):
        hits.append(list(zip(numbers_k, scores_k, strict=True)))
    return hits


def folder_of_images(path: str) -> InMemorySource | None:
    """A folder of image files, at any depth, as a source without captions; None if ``path`` is not
    one."""
    root = Path(path)
    if not root.is_dir() or any(root.glob("*.tar")):
        return None
    files = image_files(root)
    if not files:
        return None
    rows = [Row(str(file.relative_to(root)), file) for file in files]
    return InMemorySource(root.resolve().name, root, rows)
