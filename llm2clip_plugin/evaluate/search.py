"""``llm2clip search``: the images of a data set that are nearest to a text, listed, as JSON, and as a page.

Shapes: Q texts, D projection dimension.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.cache import source_digest, tensors_digest
from llm2clip_plugin.data.images import EvalTransform, ImageConfig, Normalize
from llm2clip_plugin.data.remote import default_download_folder
from llm2clip_plugin.data.samples import BrokenImage, BrokenSample, Caption
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.evaluate.classification import IMAGE_ENDINGS
from llm2clip_plugin.evaluate.config import SEARCH_COMMAND, SearchConfig
from llm2clip_plugin.evaluate.opening import (
    NOTES_SHOWN,
    InMemorySource,
    OpenedTower,
    Row,
    Teacher,
    dataset_name,
    on_all_ranks,
    open_tower,
)
from llm2clip_plugin.files import ContractError, printable
from llm2clip_plugin.pages import page_style, render, thumbnail
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.train.distributed import barrier, gather_objects, group_of, on_first_rank, rank, world_size

# What ``llm2clip search`` found as one HTML file: texts and pictures, no script, nothing fetched.


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that was found for a text."""

    key: str  # of its sample
    score: float  # cosine
    picture: str | None  # data URI; None if it can't be read any more


@dataclass(frozen=True, kw_only=True)
class Result:
    """A text and the images nearest to it, best first."""

    text: str
    found: list[Found]


def search_page(title: str, intro: str, results: Sequence[Result]) -> str:
    """The page's HTML; every text is escaped."""
    template = Path(__file__).with_name("search_page.html")
    return render(template, title=title, intro=intro, results=results, style=page_style())


# The embeddings of a data set's images on disk, and the images that are nearest to a text.

FORMAT = 2  # of a part; 1 had no hash
HASH = "sha256"  # in a part's metadata
PART = 4096  # images of a file, and what a stopped command embeds again at most


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    number: int  # in the source
    score: float  # cosine


class ImageIndex:
    """The embedded images of one source."""

    def __init__(self, parts: Sequence[Path], broken: Sequence[BrokenSample] = ()) -> None:
        self.parts = list(parts)
        self.broken = list(broken)  # left out; those of this run alone

    def search(self, text_QD: Tensor, count: int) -> list[list[Hit]]:
        """For each text the ``count`` nearest images, best first; a part at a time is in memory.

        Raises ContractError for a damaged part, ValueError if no image is readable.
        """
        score_Qk, number_Qk = torch.empty(len(text_QD), 0), torch.empty(len(text_QD), 0, dtype=torch.int64)
        for path in self.parts:
            image_ND, number_N = _read(path)
            scores = torch.cat((score_Qk, text_QD.float().cpu() @ image_ND.T), dim=1)
            numbers = torch.cat((number_Qk, number_N.expand(len(text_QD), -1)), dim=1)
            score_Qk, chosen = scores.topk(min(count, scores.shape[1]), dim=1)
            number_Qk = numbers.gather(1, chosen)
        if not score_Qk.shape[1]:
            raise ValueError(f"no readable images: {self.broken[0] if self.broken else 'the data is empty'}")
        return [
            [Hit(number, score) for number, score in zip(numbers, scores, strict=True)]
            for numbers, scores in zip(number_Qk.tolist(), score_Qk.tolist(), strict=True)
        ]


def index_folder(tower: OpenedTower, source: Source, parent: Path) -> Path:
    """The folder below ``parent`` of a source's images, embedded by this tower."""
    card, stamps = tower.dual.card, [str(stamp) for stamp in source.stamps]
    data = [source_digest(source), source.config.images, source.config.image_field, stamps]
    images = dataclasses.asdict(tower.images)
    digest = sha256_text(canonical_json([card.weights_sha256, card.adapter_sha256, data, images, PART, FORMAT]))
    return parent / f"{source.name}-{digest[:12]}"


def embed_images(
    tower: OpenedTower, source: Source, folder: Path, *, batch: int, workers: int, all_ranks: bool = False
) -> ImageIndex:
    """Embed the images of ``source`` whose part is not yet in ``folder``; images that can't be read are left out.

    ``all_ranks``: every rank of the default process group calls this and embeds some of the parts.
    """
    group = group_of(all_ranks)
    number, ranks = rank(group), world_size(group)
    starts = range(0, len(source), PART)
    parts = [folder / f"{part:05d}.safetensors" for part in range(len(starts))]
    missing = [(path, start) for path, start in zip(parts, starts, strict=True) if not path.is_file()][number::ranks]
    total = sum(min(PART, len(source) - start) for _, start in missing)
    broken: list[BrokenSample] = []
    with progress_bar(total=total, label="images", unit="images", show=number == 0) as bar, torch.no_grad():
        for path, start in missing:
            numbers = list(range(start, min(start + PART, len(source))))
            loader = DataLoader(_Images(source, tower.images, numbers), batch, num_workers=workers, collate_fn=list)
            normalize, vectors, readable = Normalize(tower.images, tower.device), [], []
            for items in loader:
                good = [(n, pixels) for n, pixels in items if isinstance(pixels, np.ndarray)]
                broken += [error for _, error in items if isinstance(error, BrokenSample)]
                if good:
                    pixels = normalize(torch.from_numpy(np.stack([pixels for _, pixels in good])))
                    vectors.append(tower.dual.encode_image(pixels).half().cpu())
                    readable += [n for n, _ in good]
                bar.update(len(items))
            _write(path, vectors, readable, tower.dual.card.projection_dim)
    if all_ranks:
        barrier()
    return ImageIndex(parts, [error for of_rank in gather_objects(broken, group) for error in of_rank])


def folder_of_images(path: str) -> InMemorySource | None:
    """A folder of image files, at any depth, as a source without captions; None if ``path`` is not one."""
    root = Path(path)
    if not root.is_dir() or any(root.glob("*.tar")):
        return None
    files = sorted(file for file in root.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS)
    if not files:
        return None
    stamps = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{root.resolve().name}-{sha256_text(canonical_json(stamps))[:12]}"
    return InMemorySource(name, root, [Row(stamp[0], file, ()) for stamp, file in zip(stamps, files, strict=True)])


class _Images(Dataset):
    """(number in the source, its pixels (S, S, 3) uint8 or the error)."""

    def __init__(self, source: Source, config: ImageConfig, numbers: list[int]) -> None:
        self.source, self.numbers, self.transform = source, numbers, EvalTransform(config)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | BrokenSample]:
        number, key = self.numbers[index], ""
        try:
            record = self.source.record(number, image=True)
            key = record.key
            return number, self.transform.pixels(record.read_image())
        except BrokenImage as error:
            return number, BrokenSample(self.source.locate(number)[0], key, str(error))
        except BrokenSample as error:
            return number, error


def _write(path: Path, vectors: list[Tensor], numbers: list[int], width: int) -> None:
    image_ND = torch.cat(vectors) if vectors else torch.empty(0, width, dtype=torch.float16)
    tensors = {"image_ND": image_ND, "number_N": torch.tensor(numbers, dtype=torch.int64)}
    digest = tensors_digest({name: tensor.numpy() for name, tensor in tensors.items()})
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata={HASH: digest})


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("image_ND", "number_N")}
            recorded = (file.metadata() or {}).get(HASH)
    except (SafetensorError, KeyError) as error:
        raise ContractError(f"{path} is damaged ({error}); delete it and rerun the same command") from error
    if (actual := tensors_digest({name: tensor.numpy() for name, tensor in tensors.items()})) != recorded:
        reason = f"its tensors have SHA-256 {actual[:12]}..., its metadata records {str(recorded)[:12]}..."
        raise ContractError(f"{path} is damaged ({reason}); delete it and rerun the same command")
    image_ND, number_N = tensors["image_ND"].float(), tensors["number_N"]
    if not torch.isfinite(image_ND).all():
        raise ContractError(f"{path} has values that are not finite; delete it and rerun the same command")
    return image_ND, number_N


def main(argv: list[str]) -> int:
    """``llm2clip search TOWER DATA TEXT [TEXT ...]``."""
    config = SEARCH_COMMAND.parse(argv)
    return on_all_ranks(lambda all_ranks: search(config, all_ranks=all_ranks), lambda result: report(config, *result))


def search(config: SearchConfig, *, all_ranks: bool = False) -> tuple[Source, ImageIndex, list[list[Hit]]]:
    """The source, its embedded images, and for each text the nearest of them.

    The texts are embedded first, so that a teacher that is not at hand is an error before the work on the images.
    """
    source = folder_of_images(config.data.path) or open_source(config.data)
    tower = open_tower(config.tower, config.device)
    folder = Path(config.cache) if config.cache else default_folder(config.tower)
    text_QD = on_first_rank(lambda: embed_texts(tower, config.text, folder, config.teacher))
    images = index_folder(tower, source, folder)
    index = embed_images(tower, source, images, batch=config.batch, workers=config.workers, all_ranks=all_ranks)
    return source, index, on_first_rank(lambda: index.search(text_QD, config.top_k))


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
    rows = [
        cache.rows(*source.locate(number), source.captions(number)[1], key=source.captions(number)[0])
        for number in range(len(source))
    ]
    with torch.no_grad():
        return tower.dual.encode_text(torch.cat(rows)).cpu()


def results(config: SearchConfig, source: Source, hits: Sequence[Sequence[Hit]], *, pictures: bool) -> list[Result]:
    """The hits with their keys, and with ``pictures`` what they show."""
    return [
        Result(text=text, found=[_found(source, hit, pictures) for hit in of_text])
        for text, of_text in zip(config.text, hits, strict=True)
    ]


def _found(source: Source, hit: Hit, picture: bool) -> Found:
    try:
        record = source.record(hit.number, image=True)
        return Found(key=record.key, score=hit.score, picture=thumbnail(record.read_image()) if picture else None)
    except BrokenSample as error:
        return Found(key=error.key, score=hit.score, picture=None)


def report(config: SearchConfig, source: Source, index: ImageIndex, hits: Sequence[Sequence[Hit]]) -> None:
    """Print the hits, and write the page and the JSON."""
    found = results(config, source, hits, pictures=bool(config.output))
    for result in found:
        print(f"\n{result.text}")
        for place, image in enumerate(result.found, 1):
            print(f"{place:4}  {image.score:6.3f}  {printable(image.key)}")
    print()
    for error in index.broken[:NOTES_SHOWN]:
        print(printable(f"left out: {error}"))
    if config.output:
        title = f"{dataset_name(config.tower)}: {dataset_name(config.data.path)}"
        shown = max((len(result.found) for result in found), default=0)
        intro = f"The {shown} nearest of {len(source):,} images, with their cosine similarity to the text."
        with atomic_file(config.output) as temporary:
            temporary.write_text(search_page(title, intro, found), encoding="utf-8")
        print(f"wrote {config.output}")
    if config.json:
        with atomic_file(config.json) as temporary:
            temporary.write_text(_json(config, found), encoding="utf-8")
        print(f"wrote {config.json}")


def _json(config: SearchConfig, found: Sequence[Result]) -> str:
    body = {
        "tower": config.tower,
        "data": config.data.path,
        "results": [
            {"text": result.text, "found": [{"key": image.key, "score": image.score} for image in result.found]}
            for result in found
        ],
    }
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"
