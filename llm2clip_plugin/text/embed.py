"""Embed the captions of a data set with a frozen LLM, shard by shard, into a cache.

Ranks share the shards and communicate only through the file system: each writes its own shards, and the one that finds
all of them written writes the manifest. A killed run resumes: shards that are complete are skipped.
"""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.contracts import CacheManifest
from llm2clip_plugin.data import cache as caches
from llm2clip_plugin.data import map_in_order
from llm2clip_plugin.data.index import SideFolder
from llm2clip_plugin.data.remote import default_download_folder, is_url
from llm2clip_plugin.data.samples import caption_hash
from llm2clip_plugin.data.sources import Shard, Source
from llm2clip_plugin.data.sources.tars import data_folder
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.encoder import TextEncoder

Result = TypeVar("Result")
MEMORY_BYTES = 256 << 20  # of embeddings kept in memory for captions that occur again in another shard
VERIFY_SAMPLES = 64  # captions that --verify embeds again
VERIFY_COSINE = 0.999  # of a cached embedding with a new one: int8 and another compute dtype stay above


@dataclass
class EmbedSummary:
    """Counts of one rank's run, for its report."""

    shards: int = 0  # embedded in this run
    skipped: int = 0  # shards that were complete before
    captions: int = 0  # embedded in this run, distinct within their sample
    truncated: int = 0  # captions longer than max_tokens
    empty: list[str] = field(default_factory=list)  # keys of samples without a readable caption
    seconds: float = 0.0
    waited: float = 0.0  # of these, seconds in which the LLM waited for captions to be read or rows to be written

    def lines(self, max_tokens: int) -> list[str]:
        """The report."""
        rate = self.captions / max(self.seconds, 1e-9)
        empty, keys = len(self.empty), ", ".join(self.empty[:3])
        done = f"embedded {self.captions} captions of {self.shards} shards"
        lines = {
            f"{done} in {self.seconds:.1f} s ({rate:.1f} captions/s), waiting {self.waited:.1f} s": True,
            f"{self.skipped} shards already complete, skipped": self.skipped,
            f"{self.truncated} captions truncated to {max_tokens} tokens (--max-tokens)": self.truncated,
            f"{empty} samples without a readable caption, such as {keys}; see `llm2clip data check`": empty,
        }
        return [line for line, applies in lines.items() if applies]


def default_cache_folder(source_path: str, fingerprint: str) -> Path:
    """``embeddings-<fingerprint>`` in the folder of the data; raises ValueError for data at a URL."""
    if is_url(source_path):
        raise ValueError(f"{source_path} is not a local folder; set --cache DIR")
    return data_folder(source_path) / f"embeddings-{fingerprint[:12]}"


def benchmark_cache_folder(source_path: str, fingerprint: str) -> Path:
    """``default_cache_folder``, or a folder beside the downloads if the data's is read-only and has no cache yet."""
    folder = default_cache_folder(source_path, fingerprint)
    if folder.exists() or os.access(folder.parent, os.W_OK):
        return folder
    return SideFolder.of(str(folder.parent), default_download_folder()).spare / folder.name


def shards_of_rank(shards: Sequence[Shard], rank: int, world: int) -> list[Shard]:
    """The shards of one rank, dealt out by size in alternating order, so that all ranks get about as many samples."""
    by_size = sorted(shards, key=lambda shard: (-shard.size, shard.name))
    rounds = [by_size[start : start + world] for start in range(0, len(by_size), world)]
    return [group[rank] for group in (r[:: 1 if i % 2 == 0 else -1] for i, r in enumerate(rounds)) if rank < len(group)]


def embed_source(
    source: Source,
    encoder: TextEncoder,
    directory: Path,
    dtype: str = "float16",
    rank: int = 0,
    world: int = 1,
    *,
    tokens_per_batch: int = 0,
    quiet: bool = False,
    overwrite: bool = False,
) -> tuple[CacheManifest | None, EmbedSummary]:
    """Embed this rank's shards of ``source`` into ``directory``; shards that are complete are skipped. Returns the
    manifest, or None while other ranks are still embedding, and a summary. Raises ContractError for another teacher's
    directory or another dtype, and, without ``overwrite``, as ``CacheWriter.refuse_loss``."""
    writer = caches.CacheWriter(directory, encoder.identity(), dtype)
    summary, memory = EmbedSummary(), dict[str, torch.Tensor]()
    shards, digests = shards_of_rank(source.shards, rank, world), dict[str, str]()
    started = time.monotonic()
    total = sum(shard.size for shard in shards)
    with (
        progress_bar(total=total, label="embed", unit="samples", show=not quiet) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="llm2clip-read") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="llm2clip-write") as saver,
    ):
        known = {name: fits[0] for name, fits in source.known_digests().items()}
        read = partial(_read_shard, source, encoder, writer, known, digests, overwrite)
        # while a shard is embedded, the next one is read and tokenized, and the one before is quantized and written
        contents = map_in_order(reader, read, shards, ahead=2)
        written = saver.submit(lambda: None)  # nothing to wait for yet
        for shard in shards:
            (content, waited), start, size = timed(partial(next, contents)), int(bar.n), shard.size

            def move(done: int, total: int, start: int = start, size: int = size) -> None:
                bar.update(start + size * done // total - bar.n)

            if content is None:
                summary.skipped += 1
            else:
                keys, rows, texts, tokens, truncated, empty = content
                options = {"tokens_per_batch": tokens_per_batch, "tokens": tokens, "on_batch": move}
                embeddings = _embed(encoder, texts, memory, **options)
                waited += timed(written.result)[1]
                written = saver.submit(writer.write_shard, shard.name, keys, rows, embeddings, truncated=truncated)
                summary.shards += 1
                summary.captions += len(rows)
                summary.truncated += truncated
                summary.empty += empty
                summary.waited += waited
            move(1, 1)
        summary.waited += timed(written.result)[1]
        if summary.shards:
            summary.seconds = time.monotonic() - started
    if digests:
        with source.lock(f"record the digests of {source.path}"):
            source.record_digests({name: (digest, digest) for name, digest in digests.items()})
    return writer.finish([shard.name for shard in source.shards]), summary


class _ShardContent(NamedTuple):
    """What is to be embedded of a shard."""

    keys: Sequence[str]
    rows: Sequence[tuple[int, int]]  # (sample, caption hash)
    texts: Sequence[str]  # of the rows
    tokens: Mapping[str, Sequence[int]]  # of each text
    truncated: int  # texts longer than max_tokens
    empty: Sequence[str]  # keys of samples without a readable caption


def timed(action: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and seconds that it took."""
    start = time.monotonic()
    return action(), time.monotonic() - start


def _read_shard(
    source: Source,
    encoder: TextEncoder,
    writer: caches.CacheWriter,
    known: Mapping[str, str],
    found: dict[str, str],
    overwrite: bool,
    shard: Shard,
) -> _ShardContent | None:
    """Compare a shard with its file in the cache: None if that is complete. ``known``: recorded digests; ``found`` gets
    that of the shard if its captions had to be read."""
    if shard.name in known and writer.is_complete(shard.name, known[shard.name]):
        return None
    keys, captions = caches.shard_captions(source, shard)
    rows = caches.caption_rows(captions)
    found[shard.name] = digest = caches.rows_digest(keys, rows)
    if digest != known.get(shard.name) and writer.is_complete(shard.name, digest):
        return None
    if not overwrite:
        writer.refuse_loss(shard.name, rows, f"{source.path} with the fields {', '.join(source.config.fields)}")
    text_of = {caption_hash(caption.text): caption.text for sample in captions for caption in sample}
    empty = [key for key, texts in zip(keys, captions, strict=True) if not any(map(caches.has_text, texts))]
    before, distinct = encoder.count_truncated, [*dict.fromkeys(text_of[value] for _, value in rows)]
    tokens = dict(zip(distinct, encoder.tokenize(distinct), strict=True))
    truncated = encoder.count_truncated - before
    return _ShardContent(keys, rows, [text_of[value] for _, value in rows], tokens, truncated, empty)


def _embed(encoder: TextEncoder, texts: Sequence[str], memory: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """(N, W) float32 of ``texts``; ``memory``: text -> row of those that may occur again; ``options`` of ``encode``."""
    new = [text for text in dict.fromkeys(texts) if text not in memory]
    row_of = dict(zip(new, encoder.encode(new, **options), strict=True))
    rows = [row_of[text] if text in row_of else memory[text] for text in texts]
    room = MEMORY_BYTES // (4 * encoder.width) - len(memory)
    memory |= {text: row_of[text].clone() for text in new[: max(0, room)]}
    return torch.stack(rows) if rows else torch.empty(0, encoder.width)


def verify(source: Source, encoder: TextEncoder, directory: Path) -> str:
    """Read all of the cache, compare it with the data, embed a few captions again: a report, or ContractError."""
    cache = caches.EmbeddingCache.open(directory, expect_fingerprint=encoder.identity().fingerprint)
    cache.verify()
    cache.check(source, full=True)
    numbers = random.Random(0).sample(range(len(source)), min(len(source), VERIFY_SAMPLES))
    samples = [(number, *source.captions(number)) for number in numbers]
    checked = [(number, key, captions[0]) for number, key, captions in samples if captions]
    again_NW = encoder.encode([caption.text for _, _, caption in checked])
    for (number, key, caption), row_W in zip(checked, again_NW, strict=True):
        stored_W = cache.rows(*source.locate(number), [caption])[0]
        cosine = float(torch.nn.functional.cosine_similarity(stored_W, row_W, dim=0))
        if cosine < VERIFY_COSINE:
            told = f"the cached embedding of {key!r} has cosine similarity {cosine:.4f} with a new one"
            fix = f"expected at least {VERIFY_COSINE}; delete the cache and embed again"
            raise ContractError(f"{directory}: {told}, {fix}")
    return (
        f"{directory} is complete: {len(cache.manifest.shards)} shards, {cache.manifest.captions} captions, "
        f"{cache.width} wide, {cache.manifest.dtype}; {len(checked)} captions embedded again agree"
    )
