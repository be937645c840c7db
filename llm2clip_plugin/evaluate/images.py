"""Images to measure: sources whose rows are in memory, images with a class label, and how they are encoded.

Shapes: B images of a batch, N images, D width of a feature, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm2clip_plugin.console import track
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.pairs import EvalPairs, eval_pairs
from llm2clip_plugin.data.samples import BrokenSample, Caption, Sample
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.tars import scan_tar, split_name
from llm2clip_plugin.train.distributed import Group, gather_objects, group_of, rank, world_size

NOT_A_CLASS = (".", "embeddings-")  # prefixes of other folders: hidden ones, the prompts' cache
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")


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

    def record(self, number: int, *, image: bool = False) -> Sample:
        self.place(number)
        row = self.rows[number]
        return Sample(row.key, {}, row.meta, partial(self._read_image, row))

    def _with_captions(self, number: int, record: Sample) -> Sample:
        return replace(record, captions=self.rows[number].captions)

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


@dataclass(frozen=True)
class LabeledImages:
    """N images, each with a label: the index of its class in ``classes``."""

    source: Source
    classes: list[str]  # the data's own names: folders, values of the field, or the numbers in .cls members
    labels: list[int]
    clusters: list[str]  # resampled together in the bootstrap, held out together


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls or class folders.

    ``field`` and ``cluster`` are fields of each sample's JSON. Raises FileNotFoundError, or ValueError for another
    layout.
    """
    if field:
        return _by_field(open_source(SourceConfig(path=path)), field, cluster)
    root = Path(path)
    if root.is_file() or any(root.rglob("*.tar")):
        return _of_tars(root)
    if any(entry.is_dir() for entry in root.iterdir()):
        return _of_folders(root)
    raise ValueError(
        f"{path} has no class folders and no tars with .cls members; for captioned data pass --label FIELD"
    )


def _by_field(source: Source, field: str, cluster: str) -> LabeledImages:
    """Any captioned data source."""
    values, clusters = [], []
    for record in map(source.record, range(len(source))):
        for name in filter(None, (field, cluster)):
            if name not in record.meta:
                known = ", ".join(sorted(record.meta)) or "none"
                raise ValueError(f"{source.path}: {record.key!r} has no field {name!r} in its JSON; known: {known}")
        values.append(str(record.meta[field]))
        clusters.append(str(record.meta[cluster]) if cluster else record.key)
    classes = sorted(set(values))
    number_of = {value: number for number, value in enumerate(classes)}
    return LabeledImages(source, classes, [number_of[value] for value in values], clusters)


def _of_folders(path: Path) -> LabeledImages:
    """``CLASS/**/IMAGE.jpg``; classes in alphabetical order of their folders."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(NOT_A_CLASS))
    images = [(label, file) for label, folder in enumerate(folders) for file in image_files(folder)]
    rows = [Row(str(file.relative_to(path)), file) for _, file in images]
    source = InMemorySource(str(path), path, rows)
    return LabeledImages(source, [folder.name for folder in folders], [label for label, _ in images], _keys(rows))


def _of_tars(path: Path) -> LabeledImages:
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index as text."""
    rows, labels = [], []
    for tar in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        parts: dict[str, dict[str, partial[bytes]]] = {}
        for member in scan_tar(tar):
            key, ending = split_name(member.name)
            read = partial(_read, tar, member.offset_data, member.size)
            parts.setdefault(key, {})["image" if ending in IMAGE_ENDINGS else ending] = read
        for key, of_key in parts.items():
            if "image" not in of_key:
                continue
            text = of_key["cls"]().decode("utf-8", "replace").strip() if "cls" in of_key else ""
            if not text.isdecimal():
                raise ValueError(f"{tar}: {key}.cls contains {text!r}, expected a class index (0, 1, ...)")
            rows.append(Row(f"{tar.stem}/{key}", of_key["image"]))
            labels.append(int(text))
    source = InMemorySource(str(path), path, rows)
    return LabeledImages(source, [str(number) for number in range(max(labels) + 1)], labels, _keys(rows))


def _keys(rows: list[Row]) -> list[str]:
    return [row.key for row in rows]


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Features of the readable images, in order."""

    feature_ND: Tensor  # float32, on the CPU
    label_N: Tensor  # int64
    keys: list[str]
    clusters: list[str]
    broken: list[BrokenSample]

    def mean_per_class(self, hit_N: Tensor) -> float:
        """The unweighted mean over the classes of their mean hits."""
        return float(torch.stack([hit_N[self.label_N == label].mean() for label in torch.unique(self.label_N)]).mean())

    def items(self, classes: Sequence[str], hit_N: Tensor) -> list[dict[str, Any]]:
        """One item of a score file for each image; ``part`` is the name of its class."""
        rows = zip(self.keys, hit_N.tolist(), self.clusters, self.label_N.tolist(), strict=True)
        return [
            {"id": key, "score": hit, "cluster": cluster, "part": classes[label]} for key, hit, cluster, label in rows
        ]


class EncodedImages(NamedTuple):
    """What ``encode_images`` returns: the readable images in order, and the others."""

    numbers: list[int]  # in the source
    keys: list[str]
    meta: list[dict[str, Any]]  # the JSON of each sample
    vectors: list[Tensor]  # (b, D) of each batch, float32, on the CPU
    broken: list[BrokenSample]


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], Tensor],
    batches: EvalPairs,
    config: ImageConfig,
    device: torch.device,
    group: Group,
    *,
    show: bool = True,
) -> EncodedImages:
    """Every rank's batches through ``encode``, (B, 3, S, S) on ``device`` -> (B, D); the images of all ranks."""
    normalize = Normalize(config, device)
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of calls.
    calls = max(gather_objects(len(batches), group))
    own, remaining = EncodedImages([], [], [], [], []), iter(batches)
    for _ in track(range(calls), total=calls, label="images", unit="batches", show=show and rank(group) == 0):
        batch = next(remaining, None)
        if batch is None:
            encode(normalize(torch.zeros(1, config.size, config.size, 3, dtype=torch.uint8)))
            continue
        own.vectors.append(encode(normalize(batch["pixels"])).float().cpu())
        own.numbers.extend(batch["image_ids"].tolist())
        own.keys.extend(batch["keys"])
        own.meta.extend(batch["meta"])
    own.broken.extend(batches.broken)
    ranks = gather_objects(own, group)
    return EncodedImages(*([item for part in parts for item in part] for parts in zip(*ranks, strict=True)))


def image_features(
    encode: Callable[[Tensor], Tensor],
    images: LabeledImages,
    config: ImageConfig,
    device: torch.device,
    *,
    batch: int = 64,
    workers: int = 0,
    all_ranks: bool = False,
) -> ImageFeatures:
    """Labeled images through ``encode`` (see ``encode_images``); broken ones are left out and listed in ``broken``.

    ``all_ranks``: every rank of the default process group calls this, encodes a part, and gets all features.
    Raises ValueError if no image is readable.
    """
    group, source = group_of(all_ranks), images.source
    number, ranks = rank(group), world_size(group)
    batches = eval_pairs(source, None, config, batch=batch, kinds=None, rank=number, world=ranks, workers=workers)
    found = encode_images(encode, batches, config, device, group)
    if not found.numbers:
        raise ValueError(f"{source.path} contains no readable images: {found.broken[0]}")
    return ImageFeatures(
        feature_ND=torch.cat(found.vectors),
        label_N=torch.tensor([images.labels[number] for number in found.numbers]),
        keys=found.keys,
        clusters=[images.clusters[number] for number in found.numbers],
        broken=found.broken,
    )
