"""A data set through a dual encoder: every image and every distinct caption once, on all ranks.

Shape letters: N images, M captions, U distinct captions, D joint width, W width of a teacher embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.evaluation import EvalPairs, eval_pairs
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption
from llm2clip_plugin.evaluate.pairing import row_digests
from llm2clip_plugin.progress import track
from llm2clip_plugin.train.distributed import gather_objects, group_of
from llm2clip_plugin.vision.dual import DualEncoder, LoadedDualEncoder

Dual = DualEncoder | LoadedDualEncoder  # encode_image and encode_text into one space
TEXT_BATCH = 512  # captions in one call of the text adapter


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """A data set in the joint space."""

    image_ND: Tensor  # float32, on the CPU, in the source's order
    text_MD: Tensor  # float32, on the CPU; captions with one teacher embedding have the same bits
    owner_M: Tensor  # int64: which of the N images a caption belongs to
    captions: list[Caption]  # M
    keys: list[str]  # N
    meta: list[dict[str, Any]]  # N: the samples' own JSON
    broken: list[BrokenSample]  # samples that were left out

    def image_labels(self, field: str = "") -> Tensor:
        """(N,) int64: images with the same value of ``field`` in their JSON get one label; without it each its own.

        Raises ValueError if an image's JSON lacks the field.
        """
        if not field:
            return torch.arange(len(self.keys))
        values = self.meta_values(field)
        number = {value: label for label, value in enumerate(dict.fromkeys(values))}
        return torch.tensor([number[value] for value in values])

    def meta_values(self, field: str) -> list[str]:
        """(N) the value of a field of each image's JSON, as text; ValueError names an image without it."""
        for key, meta in zip(self.keys, self.meta, strict=True):
            if field not in meta:
                known = ", ".join(sorted(meta)) or "none"
                raise ValueError(f"sample {key!r} has no field {field!r} in its JSON; it has: {known}")
        return [str(meta[field]) for meta in self.meta]


def embed_pairs(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    *,
    kinds: Sequence[str] = (),
    languages: Sequence[str] = (),
    limit: int = 0,
    batch: int = 64,
    workers: int = 0,
    all_ranks: bool = False,
    quiet: bool = False,
) -> EmbeddedPairs:
    """Every image of ``source`` (or the first ``limit``) and its captions of these kinds and languages; () is all.

    A caption goes through the text adapter once, whichever images have it, so that equal captions stay equal.
    ``all_ranks``: every rank of the default process group calls this; the work is shared, each gets everything.
    A sample that is broken or has no such caption is left out and named in ``broken``.

    Raises ValueError if nothing is left; ContractError if the cache is not this source's.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if all_ranks else (0, 1)
    share = eval_pairs(
        source,
        None,  # captions are read below: all of them on every rank, so that equal ones are encoded once
        images,
        batch=batch,
        kinds=kinds,
        languages=languages,
        indices=range(min(limit, len(source)) if limit else len(source)),
        rank=rank,
        world=world,
        workers=workers,
    )
    with evaluating(dual) as encoders:
        found = _images(encoders, share, images.size, all_ranks, show=not quiet and rank == 0)
        if not found.index:
            first = found.broken[0] if found.broken else "it is empty"
            raise ValueError(f"no image of {source.path} can be used: {first}")
        teacher_UW, place_M, owner_M, captions = _captions(source, cache, found.index, kinds, languages)
        text_UD = encode_texts(encoders, teacher_UW, all_ranks)
    return EmbeddedPairs(
        image_ND=torch.cat(found.vectors),
        text_MD=text_UD[place_M],
        owner_M=owner_M,
        captions=captions,
        keys=found.keys,
        meta=found.meta,
        broken=found.broken,
    )


@dataclass
class _Images:
    """One rank's images, then all of them."""

    index: list[int]  # number in the source
    keys: list[str]
    meta: list[dict[str, Any]]
    broken: list[BrokenSample]
    vectors: list[Tensor]  # (b, D) each


def _images(encoders: Dual, share: EvalPairs, size: int, all_ranks: bool, show: bool) -> _Images:
    """This rank's share of the images through the tower, then everybody's."""
    device = next(encoders.parameters()).device
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of calls.
    calls = max(gather_objects(len(share), group_of(all_ranks)))
    mine, batches = _Images([], [], [], [], []), iter(share)
    for _ in track(range(calls), total=calls, label="images", unit="batches") if show else range(calls):
        batch = next(batches, None)
        if batch is None:
            encoders.encode_image(torch.zeros(1, 3, size, size, device=device))
            continue
        mine.vectors.append(encoders.encode_image(batch["pixel_values"].to(device)).float().cpu())
        mine.index += batch["image_ids"].tolist()
        mine.keys += batch["keys"]
        mine.meta += batch["meta"]
    mine.broken = share.broken
    every = gather_objects(mine, group_of(all_ranks))
    return _Images(
        [index for part in every for index in part.index],
        [key for part in every for key in part.keys],
        [meta for part in every for meta in part.meta],
        [error for part in every for error in part.broken],
        [rows for part in every for rows in part.vectors],
    )


def _captions(
    source: Source, cache: EmbeddingCache, index: Sequence[int], kinds: Sequence[str], languages: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, list[Caption]]:
    """Distinct teacher embeddings (U, W), each caption's place among them (M,), its image (M,), and the captions."""
    first: dict[bytes, int] = {}
    rows: list[Tensor] = []
    place: list[int] = []
    owner: list[int] = []
    captions: list[Caption] = []
    for number, sample in enumerate(index):
        key, every = source.captions(sample)
        wanted = [c for c in every if (not kinds or c.kind in kinds) and (not languages or c.language in languages)]
        embedding_mW = cache.rows(*source.locate(sample), wanted, key=key)
        for row, digest in zip(embedding_mW, row_digests(embedding_mW), strict=True):
            if digest not in first:
                first[digest] = len(rows)
                rows.append(row)
            place.append(first[digest])
        owner += [number] * len(wanted)
        captions += wanted
    return torch.stack(rows), torch.tensor(place), torch.tensor(owner), captions


def encode_texts(encoders: Dual, teacher_UW: Tensor, all_ranks: bool = False) -> Tensor:
    """(U, D) float32 on the CPU; the batches are the same on any number of ranks, so the bits are too."""
    device = next(encoders.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if all_ranks else (0, 1)
    batches = teacher_UW.split(TEXT_BATCH)
    rounds = -(-len(batches) // world)
    done: dict[int, Tensor] = {}
    for turn in range(rounds):
        number = turn * world + rank
        rows = batches[number] if number < len(batches) else batches[0][:1]  # the same number of calls on every rank
        vectors = encoders.encode_text(rows.to(device)).float().cpu()
        if number < len(batches):
            done[number] = vectors
    every = {number: rows for part in gather_objects(done, group_of(all_ranks)) for number, rows in part.items()}
    return torch.cat([every[number] for number in range(len(batches))])


@contextmanager
def evaluating(dual: Dual) -> Iterator[Dual]:
    """The module in eval mode without gradients; afterwards every part is in the mode that it was in."""
    modes = {module: module.training for module in dual.modules()}
    dual.eval()
    try:
        with torch.no_grad():
            yield dual
    finally:
        for module, training in modes.items():
            module.training = training
