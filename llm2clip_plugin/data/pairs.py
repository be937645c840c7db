"""The rows of a batch: an image with the teacher's embeddings of its captions, or captions alone.

Shapes: b images of a batch on one rank, S pixels a side, k captions of an image, W width of a
teacher embedding, V of a second one.

A row is a function of (seed, pass, sample). A sample that can't be used is replaced by another,
which is a function of them too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, as_square, training_pixels
from llm2clip_plugin.data.remote import shuffle_window, take_retries
from llm2clip_plugin.data.sampler import Draw, Mixture, hash_words, sample_rng
from llm2clip_plugin.data.samples import (
    AugmentConfig,
    BrokenSample,
    Caption,
    caption_hash,
    choose_captions,
    row_bytes,
    select_captions,
)
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.pictures import BrokenImage

SUBSTITUTES = 20  # samples tried in place of a broken one
# an image's id is (source << 40) + sample; more samples than any source has
SOURCE_BITS = 40


@dataclass(frozen=True)
class Row:
    """One image of a batch with k of its captions."""

    pixels: np.ndarray | None  # (S, S, 3) uint8; None for captions alone
    captions: tuple[Caption, ...]
    embeddings: torch.Tensor | None  # (k, W) float32; None without a cache
    targets: torch.Tensor | None  # (k, V) float32 from a second cache, None without one
    image_id: int
    key: str
    broken: tuple[BrokenSample, ...]  # the samples that this row replaces
    meta: Mapping[str, Any] = field(default_factory=dict)  # of an evaluated sample
    # of an image that keeps its aspect: rows and columns of patches
    shape: tuple[int, int] | None = None


@dataclass(eq=False)
class PairDataset(Dataset):
    """The row of a draw: augmented image and one of its selected captions, a function of (seed,
    pass, sample)."""

    sources: Sequence[Source]
    caches: Sequence[EmbeddingCache | None]  # one a source
    images: ImageConfig | None  # None for captions alone, whose images are not read
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    _: KW_ONLY
    seed: int
    # how often each kind is drawn; {}: evenly
    caption_weights: Mapping[str, float] = field(default_factory=dict)
    # captions k of a row; an image that has fewer repeats them
    captions_per_image: int = 1
    # a second cache a source, of the same captions by another teacher
    targets: Sequence[EmbeddingCache] = ()
    # size of the global batches, each of one source; 0: a batch mixes the sources
    one_source_batch: int = 0

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's image and embeddings."""
        width = cache_width(self.caches) + cache_width(self.targets)
        side = 0 if self.images is None else self.images.size
        return row_bytes(side, width * self.captions_per_image)

    def mixture(self) -> Mixture:
        """The order in which samples of these sources are drawn."""
        paths = [source.path for source in self.sources]
        sizes: list[list[int]] = []
        weights: list[float] = []
        windows: list[int] = []
        for source in self.sources:
            sizes.append([shard.size for shard in source.shards])
            weights.append(source.config.weight)
            windows.append(shuffle_window(source.config.shuffle_window, paths))
        return Mixture(sizes, weights, self.seed, windows, batch=self.one_source_batch)

    def __getitem__(self, draw: Draw) -> Row:
        """Raises ValueError if a sample and all of its substitutes are broken."""
        broken: list[BrokenSample] = []
        length = len(self.sources[draw.source])
        for attempt in range(SUBSTITUTES + 1):
            index = draw.index
            if attempt:
                words = (self.seed, draw.epoch, draw.source, draw.index, attempt)
                index = hash_words("substitute", *words) % length
            try:
                return self._row(Draw(draw.source, index, draw.epoch), tuple(broken))
            except BrokenSample as error:
                broken.append(error)
        listed = "\n".join(f"  {error}" for error in broken)
        path = self.sources[draw.source].path
        raise ValueError(
            f"{len(broken)} consecutive samples of {path} are broken:\n{listed}"
        )

    def _row(self, draw: Draw, broken: tuple[BrokenSample, ...]) -> Row:
        source = self.sources[draw.source]
        cache = self.caches[draw.source]
        shard, within = source.locate(draw.index)
        sample = None if self.images is None else source[draw.index]
        if sample is None:
            key, all_captions = source.captions(draw.index)
        else:
            key = sample.key
            all_captions = sample.captions
        kinds = source.config.kinds or tuple(self.caption_weights)
        captions = select_captions(all_captions, kinds, source.config.languages)
        if not captions:
            pairs = {f"{caption.kind}:{caption.language}" for caption in all_captions}
            available = ", ".join(sorted(pairs)) or "none"
            wanted = f"kinds {tuple(kinds)} and languages {source.config.languages}"
            reason = f"no caption of {wanted}; available: {available}"
            raise BrokenSample(shard, key, reason)
        rng = sample_rng(self.seed, draw.epoch, draw.source, draw.index)
        chosen = choose_captions(
            captions, self.caption_weights, self.captions_per_image, rng
        )
        pixels = None
        shape = None
        if sample is not None and self.images is not None:
            try:
                data = sample.read_image()
                pixels = training_pixels(data, self.images, self.augment, rng)
                pixels, shape = as_square(pixels, self.images)
            except BrokenImage as error:
                raise BrokenSample(shard, key, str(error)) from error
        embeddings = None
        if cache is not None:
            embeddings = cache.rows(shard, within, chosen, key=key)
        targets = None
        if self.targets:
            targets = self.targets[draw.source].rows(shard, within, chosen, key=key)
        image_id = (draw.source << SOURCE_BITS) + draw.index
        return Row(
            pixels, chosen, embeddings, targets, image_id, key, broken, shape=shape
        )


def cache_width(caches: Sequence[EmbeddingCache | None]) -> int:
    """Width of the caches' embeddings; 0 if there is none."""
    return next((cache.width for cache in caches if cache is not None), 0)


def collate(rows: list[Row]) -> dict[str, Any]:
    """Rows to tensors and lists; with one caption an image, its hash and embedding have no axis for
    it."""
    hashes: list[list[int]] = []
    for row in rows:
        hashes.append([caption_hash(caption.text) for caption in row.captions])
    hashes_bk = torch.tensor(hashes)
    has_one_caption = hashes_bk.shape[1] == 1
    batch: dict[str, Any] = {
        "caption_hashes": hashes_bk[:, 0] if has_one_caption else hashes_bk,
        "image_ids": torch.tensor([row.image_id for row in rows]),
        "captions": [row.captions[0].text for row in rows],
        "keys": [row.key for row in rows],
        "broken": [row.broken for row in rows if row.broken],
        "retries": [take_retries()],  # of the process that loaded these rows
    }
    if rows[0].pixels is not None:
        pixels = [row.pixels for row in rows if row.pixels is not None]
        batch["pixels"] = torch.from_numpy(np.stack(pixels))
        shapes = [row.shape for row in rows if row.shape is not None]
        if shapes:
            batch["spatial_shapes"] = torch.tensor(shapes)  # (b, 2)
    for name in ("embeddings", "targets"):
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if values:
            values_bkW = torch.stack(values)
            batch[name] = values_bkW[:, 0] if has_one_caption else values_bkW
    return batch
