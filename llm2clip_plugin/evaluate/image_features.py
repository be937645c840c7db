"""Encode the images of a source, each once; and labeled images, on all ranks.

Shapes: B images of a batch, N images, D width of a feature, S pixels a side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.data.decode import BrokenImage
from llm2clip_plugin.data.images import EvalTransform, ImageConfig, Normalize
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.evaluate.labeled_images import LabeledImages
from llm2clip_plugin.progress import progress_bar
from llm2clip_plugin.train.distributed import gather_objects, group_of, rank, world_size


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


class _Pixels(Dataset):
    """(number in the source, key, its pixels (S, S, 3) uint8 or the error)."""

    def __init__(self, source: Source, config: ImageConfig, numbers: Sequence[int]) -> None:
        self.source, self.numbers, self.transform = source, numbers, EvalTransform(config)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, str, np.ndarray | BrokenSample]:
        number, key = self.numbers[index], ""
        try:
            record = self.source.record_with_image(number)
            key = record.key
            return number, key, self.transform.pixels(record.read_image())
        except BrokenImage as error:
            return number, key, BrokenSample(self.source.locate(number)[0], key, str(error))
        except BrokenSample as error:
            return number, key, error


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """What ``encode_images`` returns: the readable images in order, and the others."""

    numbers: list[int]  # in the source
    keys: list[str]
    vectors: list[Tensor]  # of each batch, float32, on the CPU
    broken: list[BrokenSample]


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    numbers: Sequence[int],
    config: ImageConfig,
    device: torch.device,
    *,
    batch: int,
    workers: int,
    bar: Any,
) -> EncodedImages:
    """Some images of a source through ``encode``, (B, 3, S, S) on ``device`` -> (B, D)."""
    loader = DataLoader(_Pixels(source, config, numbers), batch, num_workers=workers, collate_fn=list)
    normalize, found = Normalize(config, device), EncodedImages(numbers=[], keys=[], vectors=[], broken=[])
    for items in loader:
        good = [item for item in items if isinstance(item[2], np.ndarray)]
        found.broken.extend(error for *_, error in items if isinstance(error, BrokenSample))
        if good:
            pixels = normalize(torch.from_numpy(np.stack([pixels for *_, pixels in good])))
            found.vectors.append(encode(pixels).float().cpu())
            found.numbers.extend(number for number, *_ in good)
            found.keys.extend(key for _, key, _ in good)
        bar.update(len(items))
    return found


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
    own = np.array_split(np.arange(len(source)), world_size(group))[rank(group)].tolist()
    with progress_bar(total=len(own), label="images", unit="images", show=rank(group) == 0) as bar:
        part = encode_images(encode, source, own, config, device, batch=batch, workers=workers, bar=bar)
    ranks = gather_objects(part, group)
    numbers = [number for part in ranks for number in part.numbers]
    broken = [error for part in ranks for error in part.broken]
    if not numbers:
        raise ValueError(f"{source.path} contains no readable images: {broken[0]}")
    return ImageFeatures(
        feature_ND=torch.cat([vector for part in ranks for vector in part.vectors]),
        label_N=torch.tensor([images.labels[number] for number in numbers]),
        keys=[key for part in ranks for key in part.keys],
        clusters=[images.clusters[number] for number in numbers],
        broken=broken,
    )
