"""What a dual encoder makes of a source: features of its images, of its captions, of both.

Shapes: N images, B of a batch, S pixels a side, M captions, D projection dimension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.eval_pairs import EvalPairs
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.samples import BrokenSample, Caption, select_captions
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.progress import track
from llm2clip_plugin.train.distributed import (
    Group,
    gather_objects,
    group_of,
    rank,
    world_size,
)
from llm2clip_plugin.vision.dual import DualEncoder, LoadedDualEncoder
from llm2clip_plugin.vision.parts import eval_mode

TEXT_BATCH = 512  # captions in one call of the text adapter

Dual: TypeAlias = DualEncoder | LoadedDualEncoder


class EncodedImages(NamedTuple):
    """The readable images in order, and the others."""

    numbers: list[int]  # in the source
    keys: list[str]
    meta: list[dict[str, Any]]  # the JSON of each sample
    vectors: list[Tensor]  # (b, D) of each batch, float32, on the CPU
    broken: list[BrokenSample]

    def joined(self) -> Tensor:
        """(N, D): all vectors; raises ValueError if there are none."""
        if not self.numbers:
            raise ValueError(
                f"no usable images: {(self.broken or ['the data is empty'])[0]}"
            )
        return torch.cat(self.vectors)


@torch.no_grad()
def encode_images(
    encode: Callable[..., Tensor],
    source: Source,
    images: ImageConfig,
    device: torch.device,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
    label: str = "images",
    **options: Any,
) -> EncodedImages:
    """A source's images, also those without captions, through ``encode``, (B, 3, S, S) on
    ``device`` -> (B, D) or more; of images that keep their aspect it gets the spatial_shapes (B,
    2), too.

    ``options``: batch, workers, and which samples: see `EvalPairs`. ``all_ranks``: every rank of
    the default process group calls this, encodes a part, and gets all.
    """
    group = group_of(all_ranks)
    normalize = Normalize(images, device)
    options = {
        "batch": 64,
        "kinds": None,
        "rank": rank(group),
        "world": world_size(group),
        **options,
    }
    batches = EvalPairs(source, None, images, **options)
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of
    # calls.
    calls = max(gather_objects(len(batches), group))
    encoded = EncodedImages([], [], [], [], [])
    remaining = iter(batches)
    show = not quiet and rank(group) == 0
    for _ in track(range(calls), total=calls, label=label, unit="batches", show=show):
        loaded = next(remaining, None)
        if loaded is None:
            blank = torch.zeros(1, images.size, images.size, 3, dtype=torch.uint8)
            encode(normalize(blank))
            continue
        pixels = normalize(loaded["pixels"])
        vectors = encode(pixels, *normalize.shapes(loaded))
        encoded.vectors.append(vectors.float().cpu())
        encoded.numbers.extend(loaded["image_ids"].tolist())
        encoded.keys.extend(loaded["keys"])
        encoded.meta.extend(loaded["meta"])
    encoded.broken.extend(batches.broken)
    return _of_all_ranks(encoded, group)


def _of_all_ranks(encoded: EncodedImages, group: Group) -> EncodedImages:
    """The images of every rank, in order of rank, on every rank."""
    broken = [[sample.shard, sample.key, sample.reason] for sample in encoded.broken]
    exchanged: list[Any] = [
        encoded.numbers,
        encoded.keys,
        encoded.meta,
        encoded.vectors,
        broken,
    ]
    total = EncodedImages([], [], [], [], [])
    for part in gather_objects(exchanged, group):
        numbers, keys, meta, vectors, left_out = part
        total.numbers.extend(numbers)
        total.keys.extend(keys)
        total.meta.extend(meta)
        total.vectors.extend(vectors)
        total.broken.extend(BrokenSample(*fields) for fields in left_out)
    return total


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
    numbers: list[int] = field(default_factory=list)  # N: of the images in the source

    def meta_values(self, field: str) -> list[str]:
        """The value of a field of each image's JSON as text (N); ValueError names an image without
        it."""
        values: list[str] = []
        for key, meta in zip(self.keys, self.meta, strict=True):
            values.append(str(json_field(meta, field, key)))
        return values


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
    """The images of ``source`` and their captions that ``config`` selects (kinds, languages,
    limit).

    Equal captions get equal bits, whichever images have them: each goes through the text adapter
    once. ``all_ranks``: every rank of the default process group calls this and gets everything; the
    ranks split the work. Raises ValueError if no sample is usable; ContractError if the cache does
    not belong to this source.
    """
    with eval_mode(dual) as encoders, torch.no_grad():
        options: dict[str, Any] = {
            "batch": config.batch,
            "workers": config.workers or 0,
            "kinds": config.kinds,
            "languages": config.languages,
            "indices": range(min(config.limit or len(source), len(source))),
            "all_ranks": all_ranks,
            "quiet": quiet,
        }
        device = next(encoders.parameters()).device
        encoded = encode_images(
            encoders.encode_image, source, images, device, **options
        )
        image_ND = encoded.joined()
        rows: dict[bytes, Tensor] = {}  # each distinct teacher embedding
        # of each caption
        distinct: list[bytes] = []
        owner: list[int] = []
        captions: list[Caption] = []
        for image, number in enumerate(encoded.numbers):
            key, of_sample = source.captions(number)
            used = select_captions(of_sample, config.kinds, config.languages)
            embedded = cache.rows(*source.locate(number), used, key=key)
            for caption, row in zip(used, embedded, strict=True):
                digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()
                distinct.append(digest)
                rows.setdefault(digest, row)
                owner.append(image)
                captions.append(caption)
        text_UD = encode_texts(encoders, torch.stack(list(rows.values())), all_ranks)
    position_of = {digest: position for position, digest in enumerate(rows)}
    return EmbeddedPairs(
        image_ND=image_ND,
        text_MD=text_UD[[position_of[digest] for digest in distinct]],
        owner_M=torch.tensor(owner),
        captions=captions,
        keys=encoded.keys,
        meta=encoded.meta,
        broken=encoded.broken,
        numbers=encoded.numbers,
    )


def encode_texts(encoders: Dual, teacher_UW: Tensor, all_ranks: bool = False) -> Tensor:
    """(U, D) float32 on the CPU; batches, and so bits, are the same on any number of ranks."""
    device = next(encoders.parameters()).device
    group = group_of(all_ranks)
    batches = teacher_UW.split(TEXT_BATCH)
    ranks = world_size(group)
    # every rank makes the same number of calls, the last ones perhaps with a row that is not used
    calls = math.ceil(len(batches) / ranks)
    encoded_here: list[Tensor] = []
    for call in range(calls):
        number = call * ranks + rank(group)
        teacher_BW = batches[number] if number < len(batches) else batches[0][:1]
        text_BD = encoders.encode_text(teacher_BW.to(device))
        encoded_here.append(text_BD.float().cpu())
    encoded = gather_objects(encoded_here, group)
    parts: list[Tensor] = []
    for number in range(len(batches)):
        of_rank = encoded[number % ranks]
        parts.append(of_rank[number // ranks])
    return torch.cat(parts)


def json_field(
    meta: Mapping[str, Any], name: str, key: str, *, before: str = ""
) -> Any:
    """A field of the JSON of the sample ``key``. ValueError with the known ones, after ``before``,
    if it has none."""
    if name in meta:
        return meta[name]
    names = ", ".join(sorted(meta)) or "none"
    raise ValueError(
        f"{before}sample {key!r} has no field {name!r} in its JSON; known: {names}"
    )
