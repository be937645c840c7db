"""Images with a class, from folders, tars or a field of their JSON, and their features.

Shapes: N images, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import (
    Source,
    SourceConfig,
    open_source,
    scan_tar,
    split_name,
)
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.evaluate.features import encode_images, json_field
from llm2clip_plugin.evaluate.suites import (
    IMAGE_ENDINGS,
    InMemorySource,
    Row,
    image_files,
)
from llm2clip_plugin.hashes import canonical_json, sha256_text

CLASS = "class"  # field of an image's JSON where the data has none

# prefixes of other folders: hidden ones, caches
NOT_A_CLASS = (".", "embeddings-", "forecast-")


@dataclass(frozen=True)
class LabeledImages:
    """Images whose JSON names their class."""

    source: Source
    # the data's own names: folders, values of the field, or the numbers in .cls members
    classes: list[str]
    field: str = CLASS  # of the JSON: the class
    # of the JSON: images with the same value are resampled and held out together; "": each by
    # itself
    cluster: str = ""


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls
    or class folders.

    ``field`` and ``cluster`` are fields of each sample's JSON. FileNotFoundError, or ValueError for
    another layout.
    """
    if not field:
        root = Path(path)
        has_tars = root.is_file() or any(root.rglob("*.tar"))
        return _of_tars(root) if has_tars else _of_folders(root)
    source = open_source(SourceConfig(path=path))
    classes: set[str] = set()
    # before the work: every sample has the fields
    for record in map(source.record, range(len(source))):
        classes.add(str(json_field(record.meta, field, record.key)))
        if cluster:
            json_field(record.meta, cluster, record.key)
    return LabeledImages(source, in_order(classes), field, cluster)


def in_order(classes: Iterable[str]) -> list[str]:
    """Names of classes in alphabetical order, but numbers by value: 2 before 10, as files of class
    names list them."""
    names = sorted(classes)
    if all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    return names


def _of_folders(path: Path) -> LabeledImages:
    """``CLASS/**/IMAGE.jpg``: classes `in_order`."""
    names: list[str] = []
    for entry in path.iterdir():
        if entry.is_dir() and not entry.name.startswith(NOT_A_CLASS):
            names.append(entry.name)
    classes = in_order(names)
    if not classes:
        raise ValueError(
            f"{path} has no class folders and no tars with .cls; captioned data need --label FIELD"
        )
    rows: list[Row] = []
    for name in classes:
        for file in image_files(path / name):
            key = str(file.relative_to(path))
            rows.append(Row(key, file, meta={CLASS: name}))
    source = InMemorySource(str(path), path, rows)
    return LabeledImages(source, classes)


def _of_tars(path: Path) -> LabeledImages:
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index."""
    rows = []
    for tar in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        parts: dict[str, dict[str, Callable[[], bytes]]] = {}
        for member in scan_tar(tar):
            key, ending = split_name(member.name)
            part = "image" if ending in IMAGE_ENDINGS else ending
            parts.setdefault(key, {})[part] = partial(
                _read, tar, member.offset_data, member.size
            )
        for key, of_key in parts.items():
            if "image" not in of_key:
                continue
            with errors_about(
                f"{tar}: {key}.cls", fix="expected a class index (0, 1, ...)"
            ):
                label = int(of_key["cls"]())
            row = Row(f"{tar.stem}/{key}", of_key["image"], meta={CLASS: label})
            rows.append(row)
    count = 1 + max((row.meta[CLASS] for row in rows), default=0)
    source = InMemorySource(str(path), path, rows)
    return LabeledImages(source, [str(number) for number in range(count)])


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

    def data_sha256(self, names: Sequence[str]) -> str:
        """Of the images' keys and classes, called by their ``names``, in an order that does not
        depend on the number of ranks."""
        labels = self.label_N.tolist()
        labeled = [
            [key, names[label]] for key, label in zip(self.keys, labels, strict=True)
        ]
        return sha256_text(canonical_json([sorted(labeled), sorted(names)]))

    def scores(
        self,
        hits: dict[str, Tensor],
        names: Sequence[str],
        means: dict[str, str],
        **counts: int,
    ) -> ScoreFile:
        """The mean of each of ``hits``, and the mean over classes of those in ``means`` (hits ->
        name of the metric).

        An item's score is its first hit, and its ``part`` the name of its class.
        """
        hits = {name: hit_N.double() for name, hit_N in hits.items()}
        metrics = {name: float(hit_N.mean()) for name, hit_N in hits.items()}
        labels = torch.unique(self.label_N)
        for name, metric in means.items():
            mean_of_class = [
                hits[name][self.label_N == label].mean() for label in labels
            ]
            metrics[metric] = float(torch.stack(mean_of_class).mean())
        hits_of = {name: hit_N.tolist() for name, hit_N in hits.items()}
        first = next(iter(hits_of))
        labeled = zip(self.keys, self.clusters, self.label_N.tolist(), strict=True)
        items: list[dict[str, Any]] = []
        for number, (key, cluster, label) in enumerate(labeled):
            item: dict[str, Any] = {"id": key, "cluster": cluster, "part": names[label]}
            item["score"] = hits_of[first][number]
            for name, values in hits_of.items():
                item[name] = values[number]
            items.append(item)
        return ScoreFile(
            benchmark="",
            metrics=metrics,
            items=items,
            counts={"images": len(items), "left_out": len(self.broken), **counts},
            notes=[f"left out: {error}" for error in self.broken],
        )


def image_features(
    encode: Callable[..., Tensor],
    images: LabeledImages,
    config: ImageConfig,
    device: torch.device,
    **options: Any,
) -> ImageFeatures:
    """Labeled images through ``encode``, with ``options`` of `encode_images`. ValueError if no
    image is readable."""
    encoded = encode_images(encode, images.source, config, device, **options)
    number_of = {name: number for number, name in enumerate(images.classes)}
    labels: list[int] = []
    clusters: list[str] = []
    for key, meta in zip(encoded.keys, encoded.meta, strict=True):
        labels.append(number_of[str(meta[images.field])])
        clusters.append(str(meta.get(images.cluster, key)))
    return ImageFeatures(
        feature_ND=encoded.joined(),
        label_N=torch.tensor(labels),
        keys=encoded.keys,
        clusters=clusters,
        broken=encoded.broken,
    )
