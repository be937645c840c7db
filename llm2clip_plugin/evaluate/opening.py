"""What the commands that measure share: images, the tower and its teacher, checks of the data, ranks, output.

Shapes: B images of a batch, D width of a feature, S pixels a side.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

import torch
from torch import Tensor

from llm2clip_plugin import __version__
from llm2clip_plugin.console import phase, track
from llm2clip_plugin.contracts import CacheManifest, ScoreFile, TowerCard
from llm2clip_plugin.data.cache import EmbeddingCache, differences
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.pairs import EvalPairs
from llm2clip_plugin.data.samples import BrokenSample, Caption, Sample, select_captions
from llm2clip_plugin.data.sources import Shard, Source, SourceConfig
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import default_cache_folder, embed_source
from llm2clip_plugin.text.teacher import TeacherLLM, load_dual_encoder
from llm2clip_plugin.train.distributed import barrier, choose_device, gather_objects, group_of, rank, world_size
from llm2clip_plugin.train.guard import watched_group
from llm2clip_plugin.vision.directory import fetch_directory, has_card
from llm2clip_plugin.vision.dual import LoadedDualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result")

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
NOTES_SHOWN = 10
LOOKED_AT = 2048  # samples whose JSON is read before a run, evenly spaced: what fewer lack is found later


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
        if row.image is None:
            raise BrokenSample(self.name, row.key, "the row has no image")
        try:
            return row.image.read_bytes() if isinstance(row.image, Path) else row.image()
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


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    images: ImageConfig,
    device: torch.device,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
    label: str = "images",
    **options: Any,
) -> EncodedImages:
    """A source's images, also those without captions, through ``encode``, (B, 3, S, S) on ``device`` -> (B, D) or more.

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
        own.vectors.append(encode(normalize(loaded["pixels"])).float().cpu())
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
        folder = Path(directory or default_cache_folder(source.path, teacher.fingerprint))
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

        group, cache = group_of(all_ranks), None
        with suppress(FileNotFoundError, ContractError):  # embedding redoes what is incomplete, refuses another teacher
            cache = opened()
        # decided together: a fast rank may have finished its part
        if any(gather_objects(cache is None, group)) or cache is None:
            number, ranks = rank(group), world_size(group)
            embed_source(source, teacher.encoder, folder, rank=number, world=ranks, quiet=number != 0)
            if all_ranks:
                barrier()
            cache = opened()
        return cache


def open_tower(tower: str, device: str, llm: EncoderConfig) -> OpenedTower:
    """Load a tower directory or Hub id that has a text adapter; ``device`` "" is the accelerator, if there is one.

    ``llm``: the teacher, if it is not where the card says. Raises ValueError with the command for a baseline if the
    tower has no adapter.
    """
    directory, chosen = fetch_directory(tower), choose_device(device)
    if has_card(directory) and not TowerCard.read(directory / TowerCard.FILE).projection_dim:
        raise ValueError(
            f"{tower} has no projection and text adapter to compare images with captions; fit them on it, frozen: "
            f"llm2clip train-tower DATA --tower {shlex.quote(tower)} --num-train-epochs 0 --output runs/baseline"
        )
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


def write_scores(scores: ScoreFile, path: str, *, file: TextIO | None = None) -> None:
    """Write a score file and print its path to ``file`` (stdout by default); nothing for path ""."""
    if path:
        print(f"wrote {scores.write(path)}", file=file)


def wide_console() -> Console:
    """Standard output; in a log or a pipe with lines that are long enough for any table."""
    from rich.console import Console  # train-tower evaluates, too, in LLaVA's environment, which has no rich

    return Console(width=None if sys.stdout.isatty() else 200)


def json_field(meta: Mapping[str, Any], name: str, key: str, *, before: str = "") -> Any:
    """A field of the JSON of the sample ``key``. ValueError with the known ones, after ``before``, if it has none."""
    if name in meta:
        return meta[name]
    known = ", ".join(sorted(meta)) or "none"
    raise ValueError(f"{before}sample {key!r} has no field {name!r} in its JSON; known: {known}")


def check_measurable(source: Source, config: RetrievalConfig, *, option: str = "--") -> None:
    """ValueError for kinds and languages without a caption, a field that a sample lacks; ``option``: their prefix."""
    images = min(config.limit or len(source), len(source))
    samples: list[Sample] = []
    for number in range(0, images, max(1, images // LOOKED_AT)):
        with suppress(BrokenSample):
            samples.append(source[number])
    captions = [caption for sample in samples for caption in sample.captions]
    if not select_captions(captions, config.kinds, config.languages):
        known = ", ".join(sorted({f"{caption.kind}:{caption.language}" for caption in captions})) or "none"
        raise ValueError(
            f"no caption of {source.path} has {option}kinds {' '.join(config.kinds) or '(any)'} and {option}languages "
            f"{' '.join(config.languages) or '(any)'}; known: {known}"
        )
    for setting, name in (("group", config.group), ("cluster", config.cluster)):
        for sample in samples if name else ():
            json_field(sample.meta, name, sample.key, before=f"{option}{setting} {name}: {source.path}: ")
