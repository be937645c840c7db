"""Every image of a source once, in order, with all of its captions, for retrieval.

Shapes: b images of a batch, m captions of these, S pixels a side, W width of a teacher embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.decode import BrokenImage
from llm2clip_plugin.data.images import EvalTransform, ImageConfig
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, select_captions
from llm2clip_plugin.data.worker_errors import CollatedDataset, as_it_is, raised


@dataclass(frozen=True)
class EvalItem:
    """One image with its captions."""

    index: int  # in the source
    key: str
    pixels: np.ndarray  # (S, S, 3) uint8
    captions: tuple[Caption, ...]
    embeddings: torch.Tensor | None  # (captions, W) float32; None without a cache
    meta: dict[str, Any]


class EvalDataset(Dataset):
    """Images of a source in order, prepared as by the tower's own preprocessor, with the selected captions."""

    def __init__(
        self,
        source: Source,
        cache: EmbeddingCache | None,
        images: ImageConfig,
        indices: Sequence[int],
        kinds: Sequence[str],
        languages: Sequence[str],
    ) -> None:
        self.source, self.cache, self.indices = source, cache, list(indices)
        self.kinds, self.languages = tuple(kinds), tuple(languages)
        self.transform = EvalTransform(images)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> EvalItem | BrokenSample:
        index = self.indices[number]
        shard, within = self.source.locate(index)
        try:
            sample = self.source.with_image(index)
            captions = select_captions(sample.captions, self.kinds, self.languages)
            if not captions:
                selected = f" of kinds {self.kinds} and languages {self.languages}" if sample.captions else ""
                return BrokenSample(shard, sample.key, f"no caption{selected}")
            image = sample.read_image()
            if self.cache is not None:
                self.cache.check_image(shard, within, sample.key, image)
            try:
                pixels = self.transform.pixels(image)
            except BrokenImage as error:
                return BrokenSample(shard, sample.key, str(error))
        except BrokenSample as error:
            return error
        embeddings = None if self.cache is None else self.cache.rows(shard, within, captions, key=sample.key)
        return EvalItem(index, sample.key, pixels, captions, embeddings, sample.meta)

    def collate(self, items: list[EvalItem | BrokenSample]) -> dict[str, Any]:
        """Items to tensors; broken ones are listed under ``broken``."""
        good = [item for item in items if isinstance(item, EvalItem)]
        side = self.transform.config.size
        pixels = np.stack([item.pixels for item in good]) if good else np.zeros((0, side, side, 3), np.uint8)
        batch: dict[str, Any] = {
            "pixels": torch.from_numpy(pixels),
            "image_ids": torch.tensor([item.index for item in good], dtype=torch.int64),
            "owners": torch.tensor([item.index for item in good for _ in item.captions], dtype=torch.int64),
            "captions": [caption for item in good for caption in item.captions],
            "keys": [item.key for item in good],
            "meta": [item.meta for item in good],
            "broken": [item for item in items if isinstance(item, BrokenSample)],
        }
        embeddings = [item.embeddings for item in good if item.embeddings is not None]
        return batch | ({"embeddings": torch.cat(embeddings)} if embeddings else {})


class EvalPairs:
    """Batches over a source, once. After iterating, ``broken`` lists the samples that were left out."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self.broken: list[BrokenSample] = []

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.broken = []
        for batch in raised(self._loader):
            self.broken += batch.pop("broken")
            if batch["keys"]:
                yield batch


def eval_pairs(
    source: Source,
    cache: EmbeddingCache | None,
    images: ImageConfig,
    *,
    batch: int,  # images
    kinds: Sequence[str] = (),  # only captions of these kinds; empty: all
    languages: Sequence[str] = (),  # only captions in these languages; empty: all
    indices: Sequence[int] | None = None,  # samples of the source; None: all
    rank: int = 0,
    world: int = 1,  # each rank gets consecutive samples of its own
    workers: int = 0,
) -> EvalPairs:
    """Batches of this rank's samples, in order.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; image_ids (b,) int64 (number in the source), embeddings
    (m, W) float32 (absent without a cache), owners (m,) int64: the image_ids of the captions' images, captions (m
    Caption), keys and meta (b). A sample that is broken or has no selected caption is left out and listed in
    ``.broken``.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    mine = np.array_split(chosen, world)[rank].tolist()
    dataset = EvalDataset(source, cache, images, mine, kinds, languages)
    batches = CollatedDataset(dataset, dataset.collate)
    return EvalPairs(DataLoader(batches, batch, collate_fn=as_it_is, num_workers=workers))
