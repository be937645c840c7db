"""A data set's captions through the frozen LLM, once, into a cache beside the shards.

Ranks share the shards and meet in the file system alone: each writes its own, and whoever finds all of them there
writes the manifest. Killed and started again, a run skips what is complete.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llm2clip_plugin.contracts import CacheManifest, ContractError
from llm2clip_plugin.data.cache.reader import EmbeddingCache, differences, has_text
from llm2clip_plugin.data.cache.writer import CacheWriter, caption_rows
from llm2clip_plugin.data.sources.open import Shard, Source
from llm2clip_plugin.data.sources.records import Caption, caption_hash
from llm2clip_plugin.data.sources.shards import data_folder
from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.text.encoder import CaptionEncoder

MEMO_BYTES = 256 << 20  # embeddings kept in memory for captions that come again in another shard
SPOT_CHECKS = 64  # captions that --verify embeds again
SPOT_COSINE = 0.999  # between a cached embedding and a new one: int8 and a change of compute dtype stay above


@dataclass
class Tally:
    """What was met on the way, for the report."""

    shards: int = 0  # embedded now
    skipped: int = 0  # found whole
    captions: int = 0  # embedded now, distinct within their sample
    truncated: int = 0  # longer than max_tokens, and cut
    empty: list[str] = field(default_factory=list)  # keys of samples without a caption that can be read
    seconds: float = 0.0

    def lines(self, max_tokens: int) -> list[str]:
        """The report."""
        rate = self.captions / max(self.seconds, 1e-9)
        out = [
            f"embedded {self.captions} captions of {self.shards} shards in {self.seconds:.1f} s ({rate:.1f} captions/s)"
        ]
        if self.skipped:
            out.append(f"{self.skipped} shards were whole already")
        if self.truncated:
            out.append(f"{self.truncated} captions were longer than {max_tokens} tokens and were cut (--max-tokens)")
        if self.empty:
            named = ", ".join(self.empty[:3])
            out.append(f"{len(self.empty)} samples have no readable caption ({named} ...); see `llm2clip data check`")
        return out


def default_cache_folder(source_path: str, fingerprint: str) -> Path:
    """``embeddings-<fingerprint>`` in the folder of the data; raises ValueError for data at a URL."""
    if is_url(source_path):
        raise ValueError(f"{source_path} is not a local folder; say where the cache goes with --cache DIR")
    return data_folder(source_path) / f"embeddings-{fingerprint[:12]}"


def share(shards: Sequence[Shard], rank: int, world: int) -> list[Shard]:
    """The shards of one rank: every world-th in order of size, so that all have about the same number of samples."""
    by_size = sorted(shards, key=lambda shard: (-shard.size, shard.name))
    rounds = [by_size[start : start + world] for start in range(0, len(by_size), world)]
    return [group[rank] for group in (r[:: 1 if i % 2 == 0 else -1] for i, r in enumerate(rounds)) if rank < len(group)]


def shard_captions(source: Source, shard: Shard, tally: Tally) -> tuple[list[str], list[tuple[Caption, ...]]]:
    """Keys and captions of a shard's samples; a sample that can't be read keeps its place, without captions."""
    keys: list[str] = []
    captions: list[tuple[Caption, ...]] = []
    for number in range(shard.start, shard.start + shard.size):
        key, of_sample = source.captions(number)
        if not any(map(has_text, of_sample)):
            tally.empty.append(key)
        keys.append(key)
        captions.append(of_sample)
    return keys, captions


class Memo:
    """Embeddings of captions that may come again, up to a number of bytes."""

    def __init__(self, limit: int = MEMO_BYTES) -> None:
        self._limit = limit
        self._rows: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def embed(self, encoder: CaptionEncoder, texts: Sequence[str], tokens_per_batch: int, label: str) -> torch.Tensor:
        """(N, W) float32 of ``texts``, the known ones from memory."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._rows]
        new_NW = encoder.encode(fresh, tokens_per_batch=tokens_per_batch, progress=label)
        row_of = {text: row for text, row in zip(fresh, new_NW, strict=True)}
        out_NW = torch.empty(len(texts), encoder.width)
        for index, text in enumerate(texts):
            out_NW[index] = row_of[text] if text in row_of else self._rows[text]
        for text, row in row_of.items():
            if self._bytes + row.nbytes > self._limit:
                break
            self._rows[text] = row.clone()
            self._bytes += row.nbytes
        return out_NW


def embed_source(
    source: Source,
    encoder: CaptionEncoder,
    directory: Path,
    dtype: str = "float16",
    rank: int = 0,
    world: int = 1,
    *,
    tokens_per_batch: int = 0,
    quiet: bool = False,
) -> tuple[CacheManifest | None, Tally]:
    """Embed this rank's share of ``source`` into ``directory``; shards that are whole are skipped.

    Returns the manifest, or None while another rank is still at work (the last to finish writes it), and the tally.
    Raises ContractError if the directory belongs to another teacher or dtype.
    """
    writer = CacheWriter(directory, encoder.identity(), dtype)
    tally, memo = Tally(), Memo()
    mine = share(source.shards, rank, world)
    left = sum(shard.size for shard in mine)
    started = time.monotonic()
    samples = 0
    for number, shard in enumerate(mine, 1):
        keys, captions = shard_captions(source, shard, tally)
        rows = caption_rows(captions)
        left -= shard.size
        if writer.is_complete(shard.name, keys, rows):
            tally.skipped += 1
            continue
        text_of = {caption_hash(caption.text): caption.text for of_sample in captions for caption in of_sample}
        before = encoder.count_truncated
        label = "" if quiet else f"embed {number}/{len(mine)} {shard.name}"
        embeddings = memo.embed(encoder, [text_of[value] for _, value in rows], tokens_per_batch, label)
        cut = encoder.count_truncated - before
        writer.write_shard(shard.name, keys, rows, embeddings, truncated=cut)
        tally.shards += 1
        tally.captions += len(rows)
        tally.truncated += cut
        samples += shard.size
        tally.seconds = time.monotonic() - started
        if not quiet and left:
            seconds = left * tally.seconds / samples
            print(
                f"{tally.captions / tally.seconds:.1f} captions/s, about {seconds:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    return writer.finish([shard.name for shard in source.shards]), tally


def verify(source: Source, encoder: CaptionEncoder, directory: Path) -> str:
    """Read every byte of the cache, hold it against the data, embed a few captions again; returns what was found.

    Raises ContractError or FileNotFoundError at the first thing that is wrong.
    """
    cache = EmbeddingCache.open(directory)
    if cache.fingerprint != encoder.identity().fingerprint:
        raise ContractError(
            f"{directory} belongs to another teacher: {differences(cache.manifest.teacher, encoder.identity())} "
            f"(fingerprints {cache.fingerprint[:12]} and {encoder.identity().fingerprint[:12]})"
        )
    cache.verify()
    cache.check(source)
    numbers = random.Random(0).sample(range(len(source)), min(len(source), SPOT_CHECKS))
    picked = [(number, *source.captions(number)) for number in numbers]
    picked = [(number, key, captions[0]) for number, key, captions in picked if captions]
    again = encoder.encode([caption.text for _, _, caption in picked])
    for (number, key, caption), row in zip(picked, again, strict=True):
        stored = cache.rows(*source.locate(number), [caption])[0]
        cosine = float(torch.nn.functional.cosine_similarity(stored, row, dim=0))
        if cosine < SPOT_COSINE:
            raise ContractError(
                f"{directory}: the embedding of {key!r} has cosine similarity {cosine:.4f} to the one that "
                f"{encoder.config.llm} gives now, {SPOT_COSINE} is the least allowed; delete the cache and embed again"
            )
    return (
        f"{directory} is whole: {len(cache.manifest.shards)} shards, {cache.manifest.captions} captions, "
        f"{cache.width} wide, {cache.manifest.dtype}; {len(picked)} captions embedded again agree"
    )
