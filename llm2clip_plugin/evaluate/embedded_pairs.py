"""Embed a data source with a dual encoder: every image and every distinct caption once, on all ranks.

Shapes: N images, M captions, U distinct captions, D projection dimension, W width of a teacher embedding.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.evaluation import EvalPairs, eval_pairs
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, select_captions
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.progress import track
from llm2clip_plugin.train.distributed import Group, gather_objects, group_of, rank, world_size
from llm2clip_plugin.vision.dual import DualEncoder, LoadedDualEncoder

Dual = DualEncoder | LoadedDualEncoder
TEXT_BATCH = 512  # captions in one call of the text adapter


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """Images and captions in the space that the dual encoder projects to."""

    image_ND: Tensor  # float32, on the CPU, in the source's order
    text_MD: Tensor  # float32, on the CPU; captions with one teacher embedding have the same bits
    owner_M: Tensor  # int64: position among the N of the image that a caption describes
    captions: list[Caption]  # M
    keys: list[str]  # N
    meta: list[dict[str, Any]]  # N: the JSON of each sample
    broken: list[BrokenSample]  # samples left out

    def image_labels(self, field: str = "") -> Tensor:
        """(N,) int64: equal for images with the same value of ``field`` in their JSON; all different for field "".

        Raises ValueError if the field is missing from an image's JSON.
        """
        if not field:
            return torch.arange(len(self.keys))
        values = self.meta_values(field)
        label_of = {value: label for label, value in enumerate(dict.fromkeys(values))}
        return torch.tensor([label_of[value] for value in values])

    def meta_values(self, field: str) -> list[str]:
        """The value of a field of each image's JSON as text (N); ValueError names an image without it."""
        for key, meta in zip(self.keys, self.meta, strict=True):
            if field not in meta:
                known = ", ".join(sorted(meta)) or "none"
                raise ValueError(f"sample {key!r} has no field {field!r} in its JSON; known: {known}")
        return [str(meta[field]) for meta in self.meta]


def embed_pairs(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
) -> EmbeddedPairs:
    """The images of ``source`` and their captions that ``config`` selects (kinds, languages, limit).

    Equal captions get equal bits, whichever images have them: each goes through the text adapter once.
    ``all_ranks``: every rank of the default process group calls this and gets everything; the ranks split the work.
    Raises ValueError if no sample is usable; ContractError if the cache does not belong to this source.
    """
    group = group_of(all_ranks)
    batches = eval_pairs(
        source,
        None,  # captions are read below: all of them on every rank, so that equal ones are encoded once
        images,
        batch=config.batch,
        kinds=config.kinds,
        languages=config.languages,
        indices=range(min(config.limit or len(source), len(source))),
        rank=rank(group),
        world=world_size(group),
        workers=config.workers,
    )
    with evaluating(dual) as encoders:
        encoded = _encode_images(encoders, batches, images, group, show=not quiet and rank(group) == 0)
        if not encoded.index:
            reason = encoded.broken[0] if encoded.broken else "it is empty"
            raise ValueError(f"{source.path} contains no usable images: {reason}")
        teacher_UW, distinct_M, owner_M, captions = _teacher_rows(source, cache, encoded.index, config)
        text_UD = encode_texts(encoders, teacher_UW, all_ranks)
    return EmbeddedPairs(
        image_ND=torch.cat(encoded.vectors),
        text_MD=text_UD[distinct_M],
        owner_M=owner_M,
        captions=captions,
        keys=encoded.keys,
        meta=encoded.meta,
        broken=encoded.broken,
    )


@dataclass
class _EncodedImages:
    """The images of one rank, or of all."""

    index: list[int]  # in the source
    keys: list[str]
    meta: list[dict[str, Any]]
    broken: list[BrokenSample]
    vectors: list[Tensor]  # (b, D) each


def _encode_images(encoders: Dual, batches: EvalPairs, images: ImageConfig, group: Group, show: bool) -> _EncodedImages:
    """This rank's images through the tower; the images of all ranks."""
    normalize = Normalize(images, next(encoders.parameters()).device)
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of calls.
    calls = max(gather_objects(len(batches), group))
    own, remaining = _EncodedImages([], [], [], [], []), iter(batches)
    for _ in track(range(calls), total=calls, label="images", unit="batches", show=show):
        batch = next(remaining, None)
        if batch is None:
            encoders.encode_image(normalize(torch.zeros(1, images.size, images.size, 3, dtype=torch.uint8)))
            continue
        own.vectors.append(encoders.encode_image(normalize(batch["pixels"])).float().cpu())
        own.index += batch["image_ids"].tolist()
        own.keys += batch["keys"]
        own.meta += batch["meta"]
    own.broken = batches.broken
    ranks = gather_objects(own, group)
    return _EncodedImages(*([item for part in ranks for item in vars(part)[name]] for name in vars(own)))


def _teacher_rows(
    source: Source, cache: EmbeddingCache, index: Sequence[int], config: RetrievalConfig
) -> tuple[Tensor, Tensor, Tensor, list[Caption]]:
    """Distinct teacher embeddings (U, W); of each caption its row among them (M,) and its image (M,); the captions."""
    row_of: dict[bytes, int] = {}
    rows: list[Tensor] = []
    distinct: list[int] = []
    owner: list[int] = []
    captions: list[Caption] = []
    for image, number in enumerate(index):
        key, of_sample = source.captions(number)
        used = select_captions(of_sample, config.kinds, config.languages)
        embedding_mW = cache.rows(*source.locate(number), used, key=key)
        for row in embedding_mW:
            digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()
            if digest not in row_of:
                row_of[digest] = len(rows)
                rows.append(row)
            distinct.append(row_of[digest])
        owner += [image] * len(used)
        captions += used
    return torch.stack(rows), torch.tensor(distinct), torch.tensor(owner), captions


def encode_texts(encoders: Dual, teacher_UW: Tensor, all_ranks: bool = False) -> Tensor:
    """(U, D) float32 on the CPU; the batches, and so the bits, are the same on any number of ranks."""
    device = next(encoders.parameters()).device
    group = group_of(all_ranks)
    batches = teacher_UW.split(TEXT_BATCH)
    encoded: dict[int, Tensor] = {}
    for start in range(0, len(batches), world_size(group)):
        number = start + rank(group)
        rows = batches[number] if number < len(batches) else batches[0][:1]  # the same number of calls on every rank
        vectors = encoders.encode_text(rows.to(device)).float().cpu()
        if number < len(batches):
            encoded[number] = vectors
    gathered = {number: rows for part in gather_objects(encoded, group) for number, rows in part.items()}
    return torch.cat([gathered[number] for number in range(len(batches))])


@contextmanager
def evaluating(dual: Dual) -> Iterator[Dual]:
    """``dual`` in eval mode without gradients; each submodule's mode is restored afterwards."""
    modes = {module: module.training for module in dual.modules()}
    dual.eval()
    try:
        with torch.no_grad():
            yield dual
    finally:
        for module, training in modes.items():
            module.training = training
