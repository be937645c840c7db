"""Labelled images through an encoder, once, on all ranks.

Shapes: N images, D width of a feature, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.data.images import BrokenImage, EvalTransform, ImageConfig, Normalise
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.evaluate.classes import LabelledImages
from llm2clip_plugin.progress import track
from llm2clip_plugin.train.distributed import gather_objects, group_of


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Features of the images that could be read, in order."""

    feature_ND: Tensor  # float32, on the CPU
    label_N: Tensor  # int64
    keys: list[str]
    clusters: list[str]
    broken: list[BrokenSample]


class _Pixels(Dataset):
    """(number, (S, S, 3) uint8 or the error)."""

    def __init__(self, images: LabelledImages, config: ImageConfig, numbers: list[int]) -> None:
        self.images, self.numbers, self.transform = images, numbers, EvalTransform(config)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | BrokenSample]:
        number = self.numbers[place]
        try:
            return number, self.transform.pixels(self.images.image(number))
        except BrokenImage as error:
            return number, BrokenSample(self.images.name, self.images.keys[number], str(error))
        except BrokenSample as error:
            return number, error


def image_features(
    encode: Callable[[Tensor], Tensor],
    images: LabelledImages,
    config: ImageConfig,
    device: torch.device,
    *,
    batch: int = 64,
    workers: int = 0,
    all_ranks: bool = False,
) -> ImageFeatures:
    """``encode``: (B, 3, S, S) on ``device`` -> (B, D). Broken images are left out and named.

    ``all_ranks``: each rank of the default process group encodes a run of images, and each gets all features.
    Raises ValueError if no image can be read.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if all_ranks else (0, 1)
    mine = np.array_split(np.arange(len(images)), world)[rank].tolist()
    loader = DataLoader(_Pixels(images, config, mine), batch, num_workers=workers, collate_fn=list)
    normalise, kept, vectors, broken = Normalise(config), [], [], []
    with torch.no_grad():
        for items in track(loader, total=len(loader), label="images", unit="batches") if rank == 0 else loader:
            good = [(number, pixels) for number, pixels in items if isinstance(pixels, np.ndarray)]
            broken += [error for _, error in items if isinstance(error, BrokenSample)]
            if good:
                pixels = normalise(np.stack([pixels for _, pixels in good])).to(device)
                vectors.append(encode(pixels).float().cpu())
                kept += [number for number, _ in good]
    every = gather_objects((kept, vectors, broken), group_of(all_ranks))
    kept = [number for part in every for number in part[0]]
    broken = [error for part in every for error in part[2]]
    if not kept:
        raise ValueError(f"no image of {images.name} can be read: {broken[0]}")
    return ImageFeatures(
        feature_ND=torch.cat([rows for part in every for rows in part[1]]),
        label_N=torch.tensor([images.labels[number] for number in kept]),
        keys=[images.keys[number] for number in kept],
        clusters=[images.clusters[number] for number in kept],
        broken=broken,
    )
