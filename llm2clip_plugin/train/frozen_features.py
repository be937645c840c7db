"""The frozen tower's features of the training images, to which the heads are fitted.

Each image is encoded once, without augmentation, in blocks that are the same on any number of
ranks.

Shape letters: I images, P width of the tower's pooled feature, M captions, W width of an LLM
embedding.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.eval_pairs import EvalPairs
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.samples import BrokenSample, caption_hash, caption_shares
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import NonFiniteLossError, StoppedError
from llm2clip_plugin.progress import track
from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train.distributed import (
    gather_objects,
    gather_to_first,
    rank,
    world_size,
)
from llm2clip_plugin.vision.dual import DualEncoder

log = logging.getLogger(__name__)

NAMED_KEYS = 8  # of samples, in a message
BLOCK_IMAGES = 64  # images per forward pass of the frozen tower


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """The frozen tower's features of the training images, and the teacher's embeddings of all their
    captions."""

    pooled_IP: Tensor
    embedding_MW: Tensor
    caption_hashes_M: Tensor
    count_I: Tensor  # number of its captions
    share_M: Tensor  # float64, probability of each of an image's captions


class Block(NamedTuple):
    """Images of one forward pass."""

    source: int  # its number
    samples: list[int]


@dataclass
class EncodedBlocks:
    """What a rank has encoded."""

    # of each block, by its source and its first image: fields of FrozenFeatures, in their order
    columns: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict)
    broken: list[BrokenSample] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)  # keys of samples


@torch.no_grad()
def frozen_features(
    model: DualEncoder,
    sources: Sequence[Source],
    caches: Sequence[EmbeddingCache],
    images: ImageConfig,
    *,
    max_images: int,
    caption_weights: Mapping[str, float],
    device: torch.device,
    stop: StopRequest | None = None,
    workers: int = 0,
    skip_non_finite: int = 0,
) -> FrozenFeatures | None:
    """Encode blocks of images, distributed over the ranks, and gather them in order on rank 0; None
    on the others. Images with a non-finite feature or embedding are left out; more than
    ``skip_non_finite`` raise NonFiniteLossError on every rank: one would make the heads NaN."""
    blocks = choose_blocks(sources, max_images)
    blocks_of_rank = blocks[rank() :: world_size()]
    encoded = EncodedBlocks()
    batches = _read_blocks(
        blocks_of_rank, sources, caches, images, workers, encoded.broken
    )
    progress = track(
        batches,
        total=len(blocks_of_rank),
        label="features of the frozen tower",
        unit="blocks",
        show=rank() == 0,
    )
    normalize = Normalize(images, device)
    model.eval()
    for source, batch in progress:
        if stop:
            break
        columns, bad_I = _finite(_encode(model, batch, normalize, caption_weights))
        encoded.columns[source, int(batch["image_ids"][0])] = columns
        for key, is_bad in zip(batch["keys"], bad_I.tolist(), strict=True):
            if is_bad:
                encoded.non_finite.append(key)
    model.train()
    if any(gather_objects(bool(stop))):
        raise StoppedError(
            "stopped before the heads' fit: nothing to save; rerun the same command to resume"
        )
    refuse_non_finite(encoded.non_finite, allowed=skip_non_finite)
    return _gather(encoded, images=sum(len(block.samples) for block in blocks))


def choose_blocks(sources: Sequence[Source], max_images: int) -> list[Block]:
    """Blocks of at most ``max_images`` samples, as many of each source and evenly spaced in it."""
    blocks: list[Block] = []
    for number, source in enumerate(sources):
        used = min(len(source), max(2, max_images // len(sources)))
        chosen = [index * len(source) // used for index in range(used)]
        for start in range(0, used, BLOCK_IMAGES):
            blocks.append(Block(number, chosen[start : start + BLOCK_IMAGES]))
    return blocks


def _read_blocks(
    blocks: Sequence[Block],
    sources: Sequence[Source],
    caches: Sequence[EmbeddingCache],
    images: ImageConfig,
    workers: int,
    broken: list[BrokenSample],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of a source and a batch, for each block; broken samples are added to ``broken``
    instead."""
    for number, source in enumerate(sources):
        indices: list[int] = []
        for block in blocks:
            if block.source == number:
                indices += block.samples
        # only a source's last block is shorter, so that the batches are the blocks
        pairs = EvalPairs(
            source,
            caches[number],
            images,
            batch=BLOCK_IMAGES,
            workers=workers,
            kinds=source.config.kinds,
            languages=source.config.languages,
            indices=indices,
        )
        for batch in pairs:
            yield number, batch
        broken.extend(pairs.broken)


def _encode(
    model: DualEncoder,
    batch: dict[str, Any],
    normalize: Normalize,
    caption_weights: Mapping[str, float],
) -> tuple[Tensor, ...]:
    """Pooled features, embeddings, caption hashes, the number of captions of each image, and their
    probabilities."""
    pixels = normalize(batch["pixels"])
    pooled_IP = model.pool(pixels, *normalize.shapes(batch)).float().cpu()
    hashes = [caption_hash(caption.text) for caption in batch["captions"]]
    counts = [int((batch["owners"] == image).sum()) for image in batch["image_ids"]]
    captions = iter(batch["captions"])
    shares: list[float] = []
    for count in counts:
        shares += caption_shares(list(islice(captions, count)), caption_weights)
    return (
        pooled_IP,
        batch["embeddings"],
        torch.tensor(hashes),
        torch.tensor(counts),
        torch.tensor(shares, dtype=torch.float64),
    )


def _finite(columns: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The columns of ``_encode`` without images whose feature, or embedding of a caption, is not
    finite; and which those are, (I,) bool."""
    pooled_IP, embedding_MW, caption_hashes_M, count_I, share_M = columns
    image_M = torch.repeat_interleave(torch.arange(len(count_I)), count_I)
    bad_I = ~pooled_IP.isfinite().all(1)
    bad_I[image_M[~embedding_MW.isfinite().all(1)]] = True
    good_I = ~bad_I
    good_M = good_I[image_M]
    kept = (
        pooled_IP[good_I],
        embedding_MW[good_M],
        caption_hashes_M[good_M],
        count_I[good_I],
        share_M[good_M],
    )
    return kept, bad_I


def refuse_non_finite(keys: list[str], *, allowed: int) -> None:
    """Raise NonFiniteLossError on every rank for more than ``allowed`` samples on all of them,
    whose ``keys`` each rank gives; else warn of them. Every rank must call this."""
    all_keys = [key for keys_of_rank in gather_objects(keys) for key in keys_of_rank]
    if not all_keys:
        return
    first_keys = ", ".join(all_keys[:NAMED_KEYS])
    count = "1 sample has" if len(all_keys) == 1 else f"{len(all_keys)} samples have"
    problem = f"{count} non-finite features or embeddings: {first_keys}"
    if len(all_keys) > allowed:
        raise NonFiniteLossError(
            f"before the heads' fit: {problem}",
            "check these samples (a cache: `llm2clip embed --verify`), "
            "or leave them out with --skip-bad-batches",
        )
    if rank() == 0:
        log.warning(
            "fitting the heads without %d of at most %d: %s",
            len(all_keys),
            allowed,
            problem,
        )


def _gather(encoded: EncodedBlocks, *, images: int) -> FrozenFeatures | None:
    """All ranks' features, in the order of the blocks, on rank 0; None on the others. ValueError if
    all ``images`` are broken. Every rank must call this."""
    rows = [[*block, *columns] for block, columns in encoded.columns.items()]
    broken = [[sample.shard, sample.key, sample.reason] for sample in encoded.broken]
    gathered: list[Any] = gather_to_first([rows, broken])
    if rank() > 0:
        return None
    columns_of_block: dict[tuple[int, int], list[Tensor]] = {}
    left_out: list[BrokenSample] = []
    for rows_of_rank, broken_of_rank in gathered:
        for source, first_image, *columns in rows_of_rank:
            columns_of_block[source, first_image] = columns
        left_out += [BrokenSample(*fields) for fields in broken_of_rank]
    if len(left_out) == images:
        raise ValueError(
            f"all samples are broken, the first: {left_out[0]}; run `llm2clip data check DATA`"
        )
    if left_out:
        log.warning(
            "fitting the heads without %d broken samples, the first: %s",
            len(left_out),
            left_out[0],
        )
    in_order = [columns_of_block[block] for block in sorted(columns_of_block)]
    pooled, embedding, hashes, counts, shares = (
        torch.cat(column) for column in zip(*in_order, strict=True)
    )
    return FrozenFeatures(
        pooled_IP=pooled,
        embedding_MW=embedding,
        caption_hashes_M=hashes,
        count_I=counts,
        share_M=shares,
    )
