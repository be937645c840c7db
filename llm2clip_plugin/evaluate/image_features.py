"""Encode labeled images, each once, on all ranks.

Shapes: N images, D width of a feature, S pixels a side.
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
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.evaluate.labeled_images import LabeledImages
from llm2clip_plugin.progress import track
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
        return [
            {"id": key, "score": hit, "cluster": cluster, "part": classes[label]}
            for key, hit, cluster, label in zip(
                self.keys, hit_N.tolist(), self.clusters, self.label_N.tolist(), strict=True
            )
        ]


class _Pixels(Dataset):
    """(position of the image, its pixels (S, S, 3) uint8 or the error)."""

    def __init__(self, images: LabeledImages, config: ImageConfig, numbers: list[int]) -> None:
        self.images, self.numbers, self.transform = images, numbers, EvalTransform(config)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | BrokenSample]:
        number = self.numbers[index]
        try:
            return number, self.transform.pixels(self.images.image(number))
        except BrokenImage as error:
            return number, BrokenSample(self.images.name, self.images.keys[number], str(error))
        except BrokenSample as error:
            return number, error


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
    """``encode`` maps (B, 3, S, S) on ``device`` to (B, D); broken images are left out and listed in ``broken``.

    ``all_ranks``: every rank of the default process group calls this, encodes a part, and gets all features.
    Raises ValueError if no image is readable.
    """
    group = group_of(all_ranks)
    own = np.array_split(np.arange(len(images)), world_size(group))[rank(group)].tolist()
    loader = DataLoader(_Pixels(images, config, own), batch, num_workers=workers, collate_fn=list)
    normalize, readable, vectors, broken = Normalize(config, device), [], [], []
    with torch.no_grad():
        for items in track(loader, total=len(loader), label="images", unit="batches", show=rank(group) == 0):
            good = [(number, pixels) for number, pixels in items if isinstance(pixels, np.ndarray)]
            broken += [error for _, error in items if isinstance(error, BrokenSample)]
            if good:
                pixels = normalize(torch.from_numpy(np.stack([pixels for _, pixels in good])))
                vectors.append(encode(pixels).float().cpu())
                readable += [number for number, _ in good]
    ranks = gather_objects((readable, vectors, broken), group)
    readable, vectors, broken = ([item for part in parts for item in part] for parts in zip(*ranks, strict=True))
    if not readable:
        raise ValueError(f"{images.name} contains no readable images: {broken[0]}")
    return ImageFeatures(
        feature_ND=torch.cat(vectors),
        label_N=torch.tensor([images.labels[number] for number in readable]),
        keys=[images.keys[number] for number in readable],
        clusters=[images.clusters[number] for number in readable],
        broken=broken,
    )
