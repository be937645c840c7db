"""That a cache holds the captions of a source: compared in full once, then by digests.

A digest of a shard's keys and caption hashes is in the cache since it was embedded. The digest of the shard as it is
now is kept next to the data, with the size and time of the shard's file, for each choice of caption fields. A start
compares the two. Where they differ, or the file has changed, the captions themselves are read and compared: by one of
the processes that start together, while the others wait.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.data.cache.rerun import embed_command, redo
from llm2clip_plugin.data.cache.rows import (
    caption_rows,
    has_text,
    row_numbers,
    rows_digest,
    shard_captions,
    shard_contents,
)
from llm2clip_plugin.data.cache.shard_file import ShardFile
from llm2clip_plugin.data.pool import cores, map_in_order, process_pool
from llm2clip_plugin.data.sources.base import Shard, Source
from llm2clip_plugin.progress import progress_bar

KEEP_EVERY = 30.0  # seconds between writes of what was compared, so that a killed start does not start over
NAMED = 5  # samples and shards that a message names
FEW = 16384  # samples that this process compares alone, without a pool

OpenShard = Callable[[str], ShardFile]


def check_captions(
    source: Source, entries: Mapping[str, Mapping[str, Any]], open_shard: OpenShard, *, full: bool = False
) -> None:
    """Compare a source with a cache's manifest entries: shard names, counts, and the digests of keys and captions.

    Every caption is read where no digest is kept, or everywhere, and every image, with ``full``. Raises ContractError
    at the first difference, with both values; warns of embedded shards that a folder has no longer.
    """
    _warn_of_lost_shards(source, entries)
    for shard in source.shards:
        entry = entries.get(shard.name)
        if entry is None or entry["samples"] != shard.size:
            file = open_shard(shard.name)  # raises for an unknown shard
            raise ContractError(
                f"{file.path}: shard {shard.name!r} has {shard.size} samples in {source.path}, {file.samples} "
                f"when it was embedded; {redo(file.path)}"
            )
    if source.kept is None:
        _compare_all(source, source.shards, open_shard, full=full)
        return
    if not full and not _unproven(source, entries):
        return
    with source.kept.lock(f"compare {source.path} with its embeddings"):
        shards = source.shards if full else _unproven(source, entries)
        _compare_all(source, shards, open_shard, full=full)


def _warn_of_lost_shards(source: Source, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Only of a folder, which means all of its shards; a pattern or file may be a part of what was embedded."""
    here = {shard.name for shard in source.shards}
    lost = [name for name in entries if name not in here]
    if lost and os.path.isdir(source.path) and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {source.path} has {len(here)} shards, {len(entries)} were embedded; not there: "
            f"{', '.join(lost[:NAMED])}{', ...' if len(lost) > NAMED else ''}; restore them unless they were removed "
            "on purpose",
            file=sys.stderr,
        )


def kept_digests(source: Source) -> dict[str, str]:
    """Digest of each shard of a source whose file is still the one that was read."""
    kept = source.digests.read() if source.digests else {}
    return {
        shard.name: kept[shard.name]["sha256"]
        for shard, stamp in zip(source.shards, source.stamps, strict=bool(kept))
        if shard.name in kept and kept[shard.name]["stamp"] == list(stamp)
    }


def keep_digests(source: Source, digests: Mapping[str, str]) -> None:
    """Keep the digests of some shards for the next start."""
    if source.kept is None or not digests:
        return
    with source.kept.lock(f"keep the digests of {source.path}"):
        _add(source, {name: (digest, digest) for name, digest in digests.items()})


def _add(source: Source, results: Mapping[str, tuple[str, str]]) -> None:
    """Add (digest, digest of a cache that has these captions) of some shards to the ledger; the lock is held."""
    if source.digests is None or not results:
        return
    kept, entries = source.digests.read(), {}
    for shard, stamp in zip(source.shards, source.stamps, strict=True):
        if shard.name not in results:
            continue
        digest, in_cache = results[shard.name]
        before = kept.get(shard.name, {})
        also = set(before["also"]) if before.get("sha256") == digest else set()
        entries[shard.name] = {"stamp": list(stamp), "sha256": digest, "also": sorted((also | {in_cache}) - {digest})}
    source.digests.add(entries)


def _unproven(source: Source, entries: Mapping[str, Mapping[str, Any]]) -> Sequence[Shard]:
    """The shards without a kept digest that says that the cache has their captions."""
    kept = source.digests.read() if source.digests else {}

    def proven(shard: Shard, stamp: tuple[int, int]) -> bool:
        entry = kept.get(shard.name)
        if entry is None or entry["stamp"] != list(stamp):
            return False
        return entries[shard.name]["rows_sha256"] in (entry["sha256"], *entry["also"])

    return [shard for shard, stamp in zip(source.shards, source.stamps, strict=True) if not proven(shard, stamp)]


def _compare_all(source: Source, shards: Sequence[Shard], open_shard: OpenShard, *, full: bool) -> None:
    """Compare the captions of these shards with the cache and keep the digests."""
    results: dict[str, tuple[str, str]] = {}
    written = time.monotonic()
    total = sum(shard.size for shard in shards)
    try:
        with progress_bar(total=total, label="compare captions", unit="samples") as bar:
            for shard, result in zip(shards, _compared(source, shards, open_shard, full), strict=True):
                results[shard.name] = result
                bar.update(shard.size)
                if time.monotonic() > written + KEEP_EVERY:
                    _add(source, results)
                    results, written = {}, time.monotonic()
    finally:
        _add(source, results)


def _compared(source: Source, shards: Sequence[Shard], open_shard: OpenShard, full: bool) -> Iterator[tuple[str, str]]:
    """Results of ``_compare`` in order, from all cores if there is much to read."""
    workers = min(cores(), len(shards))
    if workers <= 1 or sum(shard.size for shard in shards) <= FEW:
        yield from map(partial(_compare, source, open_shard, full), shards)
        return
    with process_pool(workers, _begin_worker, (source, open_shard, full)) as pool:
        yield from map_in_order(pool, _compare_in_worker, shards, ahead=4 * workers)


_worker: Callable[[Shard], tuple[str, str]]  # _compare with the arguments that don't change; set in each process


def _begin_worker(source: Source, open_shard: OpenShard, full: bool) -> None:
    global _worker
    _worker = partial(_compare, source, open_shard, full)


def _compare_in_worker(shard: Shard) -> tuple[str, str]:
    return _worker(shard)


def _compare(source: Source, open_shard: OpenShard, full: bool, shard: Shard) -> tuple[str, str]:
    """Digests of a shard's captions and of the cache's; ContractError at the first caption that the cache lacks."""
    checks: list[int] | None = None
    if full:
        keys, captions, checks = shard_contents(source, shard)
    else:
        keys, captions = shard_captions(source, shard)
    file = open_shard(shard.name)
    digest, in_cache = rows_digest(keys, caption_rows(captions)), file.meta["rows_sha256"]
    if full or digest != in_cache:
        for index, (key, texts) in enumerate(zip(keys, captions, strict=True)):
            row_numbers(file, shard.name, index, list(filter(has_text, texts)), key, source.path)
    if changed := file.changed_images(checks or ()):
        raise ContractError(
            f"{source.path}: {len(changed)} images of shard {shard.name!r} were changed or exchanged after their "
            f"captions were embedded: {', '.join(map(repr, map(file.key, changed[:NAMED])))}"
            f"{', ...' if len(changed) > NAMED else ''}; restore them, or delete {file.path} and rerun "
            f"`{embed_command(file.path)}`"
        )
    return digest, in_cache
