"""Whether a teacher still embeds captions as a cache has them: some are embedded again and
compared."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llm2clip_plugin.contracts import CacheManifest, shard_file
from llm2clip_plugin.data.cache import EmbeddingCache, stored_teacher
from llm2clip_plugin.data.cache_file import ShardFile, has_text
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.text.encoder import TextEncoder

VERIFY_SAMPLES = 64  # captions that --verify embeds again
# of a cached embedding with a new one: int8 and another compute dtype stay above
VERIFY_COSINE = 0.999


def verify(source: Source, encoder: TextEncoder, directory: Path) -> str:
    """Read all of the cache, compare it with the data, embed a few captions again: a report, or
    ContractError."""
    cache = EmbeddingCache.open(
        directory, expect_fingerprint=encoder.identity().fingerprint
    )
    cache.verify()
    cache.check(source, full=True)
    compared = embed_again(source, encoder, directory)
    manifest = cache.manifest
    return (
        f"{directory} is complete: {len(manifest.shards)} shards, {manifest.captions} captions, "
        f"{cache.width} wide, {manifest.dtype}; {compared} captions embedded again agree"
    )


class _CachedCaption(NamedTuple):
    key: str  # of its sample
    text: str
    row_W: torch.Tensor


def embed_again(source: Source, encoder: TextEncoder, directory: Path) -> int:
    """Embed up to VERIFY_SAMPLES cached captions again; how many. Raises ContractError if one
    differs from its row."""
    cached = list(_cached_sample(source, directory))
    again_NW = encoder.encode([caption.text for caption in cached])
    for caption, new_W in zip(cached, again_NW, strict=True):
        cosine = float(F.cosine_similarity(caption.row_W, new_W, dim=0))
        if cosine < VERIFY_COSINE:
            raise ContractError(
                f"{directory}: the cached embedding of {caption.key!r} has cosine similarity "
                f"{cosine:.4f} with a new one, expected at least {VERIFY_COSINE}; "
                "choose another --cache, or delete this one, and embed again"
            )
    return len(cached)


def _cached_sample(source: Source, directory: Path) -> Iterator[_CachedCaption]:
    """The first captions of some random samples of ``source`` whose embeddings are in the cache,
    complete or not."""
    files: dict[str, ShardFile] = {}
    for shard in source.shards:
        # not embedded yet, or damaged, which embedding finds
        with suppress(FileNotFoundError, ContractError):
            files[shard.name] = ShardFile(directory / shard_file(shard.name))
    numbers: list[int] = []
    for shard in source.shards:
        if shard.name in files:
            numbers += range(shard.start, shard.start + shard.size)
    count = min(len(numbers), VERIFY_SAMPLES)
    for number in random.Random(0).sample(numbers, count):
        name, index = source.locate(number)
        key, captions = source.captions(number)
        with suppress(ContractError):  # another caption than the one that was embedded
            with_text = [caption for caption in captions if has_text(caption)]
            if not with_text:
                continue
            first = with_text[0]
            rows = files[name].row_numbers(index, [first], key)
            row_1W = files[name].embeddings(rows)
            yield _CachedCaption(key, first.text, row_1W[0])


def renew_cache(source: Source, encoder: TextEncoder, directory: Path) -> None:
    """Prove a cache whose record is from before config.json and tokenizer were part of the
    fingerprint, by embedding some of its captions again, and renew the record; any other is left as
    it is.

    Raises ContractError if a caption's embedding differs, or if none of the source's captions is in
    the cache.
    """
    path = directory / CacheManifest.FILE
    if not path.is_file():
        return
    teacher = stored_teacher(path)
    identity = encoder.identity()
    if not teacher.is_earlier or identity.is_earlier:
        return
    if not teacher.agrees_with(identity):
        return
    compared = embed_again(source, encoder, directory)
    if not compared and any(directory.glob("**/*.safetensors")):
        raise ContractError(
            f"{directory} cannot be proven to be of {identity.llm}: "
            "config.json was not yet part of its fingerprint, "
            f"and none of its captions is in {source.path}; "
            "embed the data that it was made from first, or choose another --cache"
        )
    manifest = CacheManifest.read(path)
    if manifest.fingerprint != teacher.fingerprint:  # another rank was faster
        return
    earlier = teacher.fingerprint if compared else ""
    renewed = {
        "teacher": dict(vars(identity)),
        "fingerprint": identity.fingerprint,
        "earlier_fingerprint": earlier,
    }
    dataclasses.replace(manifest, **renewed).write(path)
    if compared and os.environ.get("RANK", "0") == "0":
        print(
            f"{directory}: {compared} captions embedded again agree; "
            "its fingerprint now includes config.json"
        )
