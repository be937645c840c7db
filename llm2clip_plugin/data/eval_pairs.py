"""Each image of a source once, with the teacher's embeddings of all its captions.

Shapes: b images of a batch, S pixels a side, W width of a teacher embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, as_square, evaluation_pixels
from llm2clip_plugin.data.pairs import Row, cache_width
from llm2clip_plugin.data.samples import (
    SMALL_PART,
    BrokenSample,
    Caption,
    plan_evaluation,
    select_captions,
)
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.data.workers import (
    CollatedDataset,
    as_it_is,
    leave_signals_to_the_run,
    raised,
)
from llm2clip_plugin.pictures import BrokenImage


@dataclass(eq=False)
class EvalPairs:
    """Batches of a source's images, each once, in order, prepared as by the tower's own
    preprocessor.

    A batch: pixels (b, S, S, 3) uint8, for images.Normalize; spatial_shapes (b, 2) int64 if native
    (images.as_square); image_ids (b,) int64 (number in the source), embeddings (m, W) float32
    (absent without a cache), owners (m,) int64: the image_ids of the captions' images, captions (m
    Caption), keys and meta (b). A sample that is broken or has no selected caption is left out and
    listed in ``broken``.
    """

    source: Source
    cache: EmbeddingCache | None
    images: ImageConfig
    _: KW_ONLY
    batch: int  # images
    # only captions of these kinds; empty: all; None: also images without captions
    kinds: Sequence[str] | None = ()
    languages: Sequence[str] = ()  # only captions in these languages; empty: all
    indices: Sequence[int] | None = None  # samples of the source; None: all
    rank: int = 0
    world: int = 1  # each rank gets consecutive samples of its own
    workers: int = 0  # loader processes; the batches don't depend on it
    broken: list[BrokenSample] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.indices is None:
            chosen = np.arange(len(self.source))
        else:
            chosen = np.asarray(self.indices, dtype=np.int64)
        mine = np.array_split(chosen, self.world)[self.rank].tolist()
        starts = range(0, len(mine), self.batch)
        self._batches = [mine[start : start + self.batch] for start in starts]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.broken = []
        rows = sum(map(len, self._batches))
        workers = min(self.workers, -(-rows // SMALL_PART))
        width = cache_width([self.cache])
        plan = plan_evaluation(self.batch, workers, self.images.size, width)
        part_indices: list[list[int]] = []
        for indices in self._batches:
            for start in range(0, len(indices), plan.part):
                part_indices.append(indices[start : start + plan.part])
        loader = DataLoader(
            CollatedDataset(self._read, self._collate),
            batch_sampler=part_indices,
            num_workers=workers,
            collate_fn=as_it_is,
            prefetch_factor=plan.prefetch if workers else None,
            worker_init_fn=leave_signals_to_the_run,
        )
        parts = raised(loader)
        for indices in self._batches:
            count = -(-len(indices) // plan.part)
            batch = joined(list(islice(parts, count)))
            self.broken += batch.pop("broken")
            del batch["seconds"]
            if batch["keys"]:
                yield batch

    def _read(self, index: int) -> Row | BrokenSample:
        shard, within = self.source.locate(index)
        try:
            sample = self.source[index]
            captions = select_captions(
                sample.captions, self.kinds or (), self.languages
            )
            if not captions and self.kinds is not None:
                reason = "no caption"
                if sample.captions:
                    reason += f" of kinds {self.kinds} and languages {self.languages}"
                return BrokenSample(shard, sample.key, reason)
            pixels = evaluation_pixels(sample.read_image(), self.images)
            pixels, shape = as_square(pixels, self.images)
        except BrokenSample as error:
            return error
        except BrokenImage as error:
            return BrokenSample(shard, sample.key, str(error))
        embeddings = None
        if self.cache is not None:
            embeddings = self.cache.rows(shard, within, captions, key=sample.key)
        return Row(
            pixels,
            captions,
            embeddings,
            None,
            index,
            sample.key,
            (),
            sample.meta,
            shape,
        )

    def _collate(self, items: list[Row | BrokenSample]) -> dict[str, Any]:
        good = [item for item in items if isinstance(item, Row)]
        side = self.images.size
        pixels = np.zeros((0, side, side, 3), np.uint8)
        all_pixels = [item.pixels for item in good if item.pixels is not None]
        if all_pixels:
            pixels = np.stack(all_pixels)
        captions: list[Caption] = []
        owners: list[int] = []
        for item in good:
            captions += item.captions
            owners += [item.image_id] * len(item.captions)
        image_ids = [item.image_id for item in good]
        batch: dict[str, Any] = {
            "pixels": torch.from_numpy(pixels),
            "image_ids": torch.tensor(image_ids, dtype=torch.int64),
            "owners": torch.tensor(owners, dtype=torch.int64),
            "captions": captions,
            "keys": [item.key for item in good],
            "meta": [item.meta for item in good],
            "broken": [item for item in items if isinstance(item, BrokenSample)],
        }
        if self.images.fit == "native":
            shapes = torch.tensor([item.shape for item in good], dtype=torch.int64)
            batch["spatial_shapes"] = shapes.reshape(-1, 2)
        embeddings = [item.embeddings for item in good if item.embeddings is not None]
        if self.cache is not None:
            nothing = torch.empty(0, self.cache.width)
            batch["embeddings"] = torch.cat([nothing, *embeddings])
        return batch


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of its parts, in order."""
    if len(parts) == 1:
        return parts[0]
    batch: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if isinstance(values[0], torch.Tensor):
            batch[name] = torch.cat(values)
        else:
            batch[name] = list(chain.from_iterable(values))
    return batch
