"""What the commands that measure share: images, the tower and its teacher, checks of the data, ranks, output.

Shapes: B images of a batch, D width of a feature, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from llm2clip_plugin import __version__
from llm2clip_plugin.bootstrap import Interval
from llm2clip_plugin.console import phase, track
from llm2clip_plugin.contracts import CacheManifest, ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache, differences
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.pairs import EvalPairs
from llm2clip_plugin.data.samples import BrokenSample, Caption, Sample, select_captions
from llm2clip_plugin.data.sources import Shard, Source, SourceConfig
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.files import ContractError, printable
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import benchmark_cache_folder, embed_source
from llm2clip_plugin.text.teacher import TeacherLLM, load_dual_encoder
from llm2clip_plugin.train.distributed import choose_device, gather_objects, group_of, on_first_rank, rank, world_size
from llm2clip_plugin.train.guard import watched_group
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import LoadedDualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config

Result = TypeVar("Result")

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
NOTES_SHOWN = 10
LOOKED_AT = 2048  # samples whose JSON is read before a run, evenly spaced: what fewer lack is found later
ALL = "all"  # the part with every caption


@dataclass(frozen=True)
class Row:
    """One image and its captions."""

    key: str
    image: Path | Callable[[], bytes] | None  # None: captions only
    captions: tuple[Caption, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


class InMemorySource(Source):
    """One shard of rows, called ``name``. Captions are kept as they are: a benchmark counts a duplicate twice."""

    def __init__(self, name: str, folder: Path, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError(f"{name}: no images found in {folder}")
        self.rows = list(rows)
        super().__init__(SourceConfig(path=str(folder)), (Shard(name, len(rows), 0),))
        self.name = name

    def record(self, number: int) -> Sample:
        self.place(number)
        row = self.rows[number]
        return Sample(row.key, {}, row.meta, partial(self._read_image, row))

    def __getitem__(self, number: int) -> Sample:
        return replace(self.record(number), captions=self.rows[number].captions)

    def _read_image(self, row: Row) -> bytes:
        try:
            return row.image() if callable(row.image) else Path(row.image or "").read_bytes()
        except OSError as error:
            raise BrokenSample(self.name, row.key, f"no image at {row.image}: {error.strerror}") from error


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS)


class EncodedImages(NamedTuple):
    """The readable images in order, and the others."""

    numbers: list[int]  # in the source
    keys: list[str]
    meta: list[dict[str, Any]]  # the JSON of each sample
    vectors: list[Tensor]  # (b, D) of each batch, float32, on the CPU
    broken: list[BrokenSample]

    def joined(self) -> Tensor:
        """(N, D): all vectors; raises ValueError if there are none."""
        if not self.numbers:
            raise ValueError(f"no usable images: {(self.broken or ['the data is empty'])[0]}")
        return torch.cat(self.vectors)


@torch.no_grad()
def encode_images(
    encode: Callable[..., Tensor],
    source: Source,
    images: ImageConfig,
    device: torch.device,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
    label: str = "images",
    **options: Any,
) -> EncodedImages:
    """A source's images, also those without captions, through ``encode``, (B, 3, S, S) on ``device`` -> (B, D) or more;
    of images that keep their aspect it gets the spatial_shapes (B, 2), too.

    ``options``: batch, workers, and which samples: see `EvalPairs`. ``all_ranks``: every rank of the default process
    group calls this, encodes a part, and gets all.
    """
    group, normalize = group_of(all_ranks), Normalize(images, device)
    options = {"batch": 64, "kinds": None, "rank": rank(group), "world": world_size(group), **options}
    batches = EvalPairs(source, None, images, **options)
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of calls.
    calls = max(gather_objects(len(batches), group))
    own, remaining, show = EncodedImages([], [], [], [], []), iter(batches), not quiet and rank(group) == 0
    for _ in track(range(calls), total=calls, label=label, unit="batches", show=show):
        loaded = next(remaining, None)
        if loaded is None:
            encode(normalize(torch.zeros(1, images.size, images.size, 3, dtype=torch.uint8)))
            continue
        own.vectors.append(encode(normalize(loaded["pixels"]), *normalize.shapes(loaded)).float().cpu())
        own.numbers.extend(loaded["image_ids"].tolist())
        own.keys.extend(loaded["keys"])
        own.meta.extend(loaded["meta"])
    own.broken.extend(batches.broken)
    ranks = gather_objects(own, group)
    return EncodedImages(*([item for part in parts for item in part] for parts in zip(*ranks, strict=True)))


@dataclass(frozen=True, kw_only=True)
class OpenedTower:
    """A dual encoder on its device, how its images are preprocessed, and the LLM that its card names."""

    dual: LoadedDualEncoder
    images: ImageConfig
    device: torch.device
    teacher: TeacherLLM

    def cache(self, source: Source, directory: str | Path = "", *, all_ranks: bool = False) -> EmbeddingCache:
        """The cache of ``source``: opened if it is complete, otherwise embedded now, by all ranks together.

        ``directory``: by default ``embeddings-<fingerprint>`` in the source's folder. A complete one is taken as it is
        if the card names no teacher. Raises ContractError if the LLM is not the tower's teacher or the directory
        belongs to another one; FileNotFoundError without the LLM.
        """
        teacher = self.teacher
        known = teacher.identity or (None if directory and not teacher.config.llm else teacher.encoder.identity())
        folder = Path(directory or benchmark_cache_folder(source.path, teacher.fingerprint))
        if known is not None and (folder / CacheManifest.FILE).is_file():
            theirs = CacheManifest.read(folder / CacheManifest.FILE)
            if theirs.fingerprint != known.fingerprint:
                raise ContractError(
                    f"the cache {folder} was not created with the tower's teacher: "
                    f"{differences(theirs.teacher, known)}; choose another --cache"
                )

        def opened() -> EmbeddingCache:
            cache = EmbeddingCache.open(folder, expect_width=teacher.llm_width or None)
            cache.check(source)
            return cache

        def is_complete() -> bool:
            with suppress(FileNotFoundError, ContractError):  # embedding redoes what is incomplete
                return opened() is not None
            return False

        if not on_first_rank(is_complete):
            number, ranks = rank(group_of(all_ranks)), world_size(group_of(all_ranks))
            embed_source(source, teacher.encoder, folder, rank=number, world=ranks, quiet=number != 0)
            gather_objects(None, group_of(all_ranks))  # all have embedded
        return opened()


def open_tower(tower: str, device: str, llm: EncoderConfig) -> OpenedTower:
    """Load a tower directory or Hub id that has a text adapter; ``device`` "" is the accelerator, if there is one.

    ``llm``: the teacher, if it is not where the card says. Raises ValueError for a tower alone.
    """
    directory, chosen = fetch_directory(tower), choose_device(device)
    images, dual = ImageConfig.from_preprocessor(preprocessor_config(directory)), load_dual_encoder(directory)
    return OpenedTower(dual=dual.to(chosen), images=images, device=chosen, teacher=TeacherLLM(dual.card, llm, chosen))


def on_all_ranks(measure: Callable[[bool], Result], report: Callable[[Result], None]) -> int:
    """``measure(all_ranks)`` on every rank of the launcher, then ``report`` on rank 0; the exit status."""
    with watched_group() as (rank, world), phase("evaluation"):
        result = measure(world > 1)
        if rank == 0:
            report(result)
    return 0


def provenance(dual: LoadedDualEncoder | None = None, **values: Any) -> dict[str, Any]:
    """``values``, the hashes of a dual encoder's weights, and the versions of what measured."""
    if dual is not None:
        card, training = dual.card, dual.card.training
        precision = {"precision": training["precision"]} if "precision" in training else {}
        values = {"weights_sha256": card.weights_sha256, "adapter_sha256": card.adapter_sha256} | precision | values
    return values | {"versions": {"llm2clip-plugin": __version__, "torch": torch.__version__}}


def dataset_name(path: str) -> str:
    """The last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2]


def write_scores(scores: ScoreFile, path: str) -> None:
    """Write a score file and print its path; nothing for path ""."""
    if path:
        print(f"wrote {scores.write(path)}")


def print_table(title: str, rows: Mapping[str, Mapping[str, str]], caption: str) -> None:
    """Named rows, and one column for each key of theirs."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], *([name, *(row.get(column, "") for column in columns)] for name, row in rows.items())]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(f"\n{title}")
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    print(caption)


def print_scores(title: str, scores: ScoreFile, found: Mapping[str, Interval], caption: str = "") -> None:
    """Every metric in percent, with its interval in ``found``: one row per part, one column per metric; and notes."""
    rows: dict[str, dict[str, str]] = {}
    for name, value in scores.metrics.items():
        part, _, metric = name.rpartition("/")
        shown = f" [{100 * found[name].low:.1f}, {100 * found[name].high:.1f}]" if name in found else ""
        rows.setdefault(part, {})[metric] = f"{100 * value:.1f}{shown}"
    first = "headline" if ALL in rows else ALL
    counts = ", ".join(f"{number} {name}" for name, number in scores.counts.items())
    caption = "; ".join(filter(None, ["percent", counts, caption]))
    print_table(title, {part or first: row for part, row in rows.items()}, caption)
    for note in scores.notes[:NOTES_SHOWN]:
        print(printable(note))


def json_field(meta: Mapping[str, Any], name: str, key: str, *, before: str = "") -> Any:
    """A field of the JSON of the sample ``key``. ValueError with the known ones, after ``before``, if it has none."""
    if name in meta:
        return meta[name]
    known = ", ".join(sorted(meta)) or "none"
    raise ValueError(f"{before}sample {key!r} has no field {name!r} in its JSON; known: {known}")


def check_measurable(source: Source, config: RetrievalConfig, *, option: str = "--") -> None:
    """ValueError for kinds and languages without a caption, a field that a sample lacks; ``option``: their prefix."""
    images, captions = min(config.limit or len(source), len(source)), set[Caption]()
    for number in range(0, images, max(1, images // LOOKED_AT)):
        with suppress(BrokenSample):
            sample = source[number]
            captions.update(sample.captions)
            for setting, name in (("group", config.group), ("cluster", config.cluster)):
                if name:
                    json_field(sample.meta, name, sample.key, before=f"{option}{setting} {name}: {source.path}: ")
    if not select_captions(list(captions), config.kinds, config.languages):
        known = ", ".join(sorted({f"{caption.kind}:{caption.language}" for caption in captions})) or "none"
        kinds, languages = (" ".join(names) or "(any)" for names in (config.kinds, config.languages))
        wanted = f"{option}kinds {kinds} and {option}languages {languages}"
        raise ValueError(f"no caption of {source.path} has {wanted}; known: {known}")
