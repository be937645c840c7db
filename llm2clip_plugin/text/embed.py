"""Embedding a data set. Ranks share its shards and communicate only by the file system: each writes
its own, and the one that finds all written writes the manifest. A killed run resumes: complete
shards are skipped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity
from llm2clip_plugin.data.cache_file import (
    caption_rows,
    has_text,
    rows_digest,
    shard_captions,
)
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.remote import SideFolder, default_download_folder, is_url
from llm2clip_plugin.data.samples import caption_hash, map_in_order
from llm2clip_plugin.data.sources import Shard, Source, data_folder
from llm2clip_plugin.progress import progress_bar
from llm2clip_plugin.text.encoder import TextEncoder
from llm2clip_plugin.text.verify import renew_cache

Result = TypeVar("Result")
# of embeddings kept in memory for captions that occur again in another shard
MEMORY_BYTES = 256 << 20


@dataclass
class EmbedSummary:
    """Counts of one rank's run, for its report."""

    shards: int = 0  # embedded in this run
    skipped: int = 0  # shards that were complete before
    captions: int = 0  # embedded in this run, distinct within their sample
    truncated: int = 0  # captions longer than max_tokens
    # keys of samples without a readable caption
    empty: list[str] = field(default_factory=list)
    seconds: float = 0.0
    # of these, seconds in which the LLM waited for captions to be read or rows to be written
    waited: float = 0.0

    def add(self, content: _ShardContent, waited: float) -> None:
        """Count a shard that was embedded."""
        self.shards += 1
        self.captions += len(content.rows)
        self.truncated += content.truncated
        self.empty += content.empty
        self.waited += waited

    def lines(self, max_tokens: int) -> list[str]:
        """The report."""
        rate = self.captions / max(self.seconds, 1e-9)
        lines = [
            f"embedded {self.captions} captions of {self.shards} shards in {self.seconds:.1f} s "
            f"({rate:.1f} captions/s), waiting {self.waited:.1f} s"
        ]
        if self.skipped:
            lines.append(f"{self.skipped} shards already complete, skipped")
        if self.truncated:
            lines.append(
                f"{self.truncated} captions truncated to {max_tokens} tokens (--max-tokens)"
            )
        if self.empty:
            keys = ", ".join(self.empty[:3])
            lines.append(
                f"{len(self.empty)} samples without a readable caption, such as {keys}; "
                "see `llm2clip data check`"
            )
        return lines


def cache_folder(source_path: str, identity: TeacherIdentity) -> Path:
    """``default_cache_folder``; the one of a cache from before config.json was part of the
    fingerprint, if there is no newer one. Raises ValueError for data at a URL."""
    folder = default_cache_folder(source_path, identity.fingerprint)
    earlier = default_cache_folder(source_path, identity.earlier().fingerprint)
    return earlier if earlier.is_dir() and not folder.is_dir() else folder


def default_cache_folder(source_path: str, fingerprint: str) -> Path:
    """``embeddings-<fingerprint>`` in the folder of the data; ValueError for data at a URL."""
    if is_url(source_path):
        raise ValueError(f"{source_path} is not a local folder; set --cache DIR")
    return data_folder(source_path) / f"embeddings-{fingerprint[:12]}"


def suite_cache_folder(source_path: str, identity: TeacherIdentity) -> Path:
    """``cache_folder``, or a folder next to the downloads if that one can neither be found nor
    made."""
    folder = cache_folder(source_path, identity)
    if folder.exists() or os.access(folder.parent, os.W_OK):
        return folder
    side_folder = SideFolder.of(str(folder.parent), default_download_folder())
    return side_folder.spare / folder.name


def shards_of_rank(shards: Sequence[Shard], rank: int, world: int) -> list[Shard]:
    """The shards of one rank, dealt out by size in alternating order, so that all ranks get about
    as many samples."""
    by_size = sorted(shards, key=lambda shard: (-shard.size, shard.name))
    mine: list[Shard] = []
    for number, start in enumerate(range(0, len(by_size), world)):
        dealt = by_size[start : start + world]  # at most one for each rank
        if number % 2 == 1:
            dealt.reverse()
        if rank < len(dealt):
            mine.append(dealt[rank])
    return mine


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
    """Embed this rank's shards of ``source`` into ``directory``; shards that are complete are
    skipped. Returns the manifest, or None while other ranks are still embedding, and a summary.
    Raises ContractError for another teacher's directory or another dtype, and, without
    ``overwrite``, as ``CacheWriter.refuse_loss``."""
    renew_cache(source, encoder, directory)
    writer = CacheWriter(directory, encoder.identity(), dtype)
    shards = shards_of_rank(source.shards, rank, world)
    total = sum(shard.size for shard in shards)
    bar = progress_bar(total=total, label="embed", unit="samples", show=not quiet)
    digests: dict[str, str] = {}
    with bar:
        read = partial(
            _read_shard,
            source,
            encoder,
            writer,
            _data_digests(source),
            digests,
            overwrite,
        )
        summary = _embed_shards(shards, read, encoder, writer, bar, tokens_per_batch)
    if digests:
        # of the data, and of the embeddings
        pairs = {name: (digest, digest) for name, digest in digests.items()}
        with source.lock(f"record the digests of {source.path}"):
            source.record_digests(pairs)
    return writer.finish([shard.name for shard in source.shards]), summary


def _data_digests(source: Source) -> dict[str, str]:
    """Shard -> the digest of its data, of those that are recorded."""
    digests = {}
    for name, of_shard in source.known_digests().items():
        digests[name] = of_shard[0]
    return digests


def _embed_shards(
    shards: Sequence[Shard],
    read: Callable[[Shard], _ShardContent | None],
    encoder: TextEncoder,
    writer: CacheWriter,
    bar: tqdm,
    tokens_per_batch: int,
) -> EmbedSummary:
    """Write the embeddings of the shards of which ``read`` returns something. While a shard is
    embedded, the next one is read and tokenized, and the one before is quantized and written."""
    summary = EmbedSummary()
    memory: dict[str, torch.Tensor] = {}
    started = time.monotonic()
    reader = ThreadPoolExecutor(1, thread_name_prefix="llm2clip-read")
    saver = ThreadPoolExecutor(1, thread_name_prefix="llm2clip-write")
    with reader, saver:
        contents = map_in_order(reader, read, shards, ahead=2)
        written = saver.submit(lambda: None)  # nothing to wait for yet
        for shard in shards:
            content, waited = timed(partial(next, contents))
            move = partial(_move, bar, int(bar.n), shard.size)
            if content is None:
                summary.skipped += 1
                move(1, 1)
                continue
            embeddings = _embed(
                encoder,
                content.texts,
                memory,
                tokens_per_batch=tokens_per_batch,
                tokens=content.tokens,
                on_batch=move,
            )
            _, waited_for_writer = timed(written.result)
            written = saver.submit(
                writer.write_shard,
                shard.name,
                content.keys,
                content.rows,
                embeddings,
                truncated=content.truncated,
            )
            summary.add(content, waited + waited_for_writer)
            move(1, 1)
        _, waited_for_writer = timed(written.result)
        summary.waited += waited_for_writer
        if summary.shards:
            summary.seconds = time.monotonic() - started
    return summary


def _move(bar: tqdm, start: int, size: int, done: int, total: int) -> None:
    """Show that ``done`` of ``total`` texts of a shard are embedded, which has ``size`` samples and
    began at ``start``."""
    bar.update(start + size * done // total - bar.n)


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
    writer: CacheWriter,
    digests_before: Mapping[str, str],
    digests: dict[str, str],
    overwrite: bool,
    shard: Shard,
) -> _ShardContent | None:
    """Compare a shard with its file in the cache: None if that is complete. ``known``: recorded
    digests; ``digests`` gets that of the shard if its captions had to be read."""
    before = digests_before.get(shard.name)
    if before is not None and writer.is_complete(shard.name, before):
        return None
    keys, captions = shard_captions(source, shard)
    rows = caption_rows(captions)
    digest = rows_digest(keys, rows)
    digests[shard.name] = digest
    if digest != before and writer.is_complete(shard.name, digest):
        return None
    if not overwrite:
        fields = ", ".join(source.config.fields)
        writer.refuse_loss(shard.name, rows, f"{source.path} with the fields {fields}")
    text_of: dict[int, str] = {}
    empty: list[str] = []
    for key, captions_of_sample in zip(keys, captions, strict=True):
        for caption in captions_of_sample:
            text_of[caption_hash(caption.text)] = caption.text
        if not any(map(has_text, captions_of_sample)):
            empty.append(key)
    texts = [text_of[value] for _, value in rows]
    distinct = list(dict.fromkeys(texts))
    truncated_before = encoder.count_truncated
    tokens = dict(zip(distinct, encoder.tokenize(distinct), strict=True))
    truncated = encoder.count_truncated - truncated_before
    return _ShardContent(keys, rows, texts, tokens, truncated, empty)


def _embed(
    encoder: TextEncoder,
    texts: Sequence[str],
    memory: dict[str, torch.Tensor],
    **options: Any,
) -> torch.Tensor:
    """(N, W) float32 of ``texts``; ``memory``: text -> row of those that may occur again;
    ``options`` of ``encode``."""
    new = [text for text in dict.fromkeys(texts) if text not in memory]
    row_of = dict(zip(new, encoder.encode(new, **options), strict=True))
    rows = [row_of[text] if text in row_of else memory[text] for text in texts]
    free_rows = max(0, MEMORY_BYTES // (4 * encoder.width) - len(memory))
    for text in new[:free_rows]:
        memory[text] = row_of[text].clone()
    return torch.stack(rows) if rows else torch.empty(0, encoder.width)
