"""That a cache holds the captions of a source: compared in full once, then by digests.

A digest of a shard's keys and caption hashes is in the cache since it was embedded. The digest of the shard as it is
now lies next to the data, with the size and time of the shard's file, for each choice of caption fields. A start
compares the two. Where they differ, or the file has changed, the captions themselves are read and compared: by one of
the processes that start together, while the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.data.cache_shard import REDO, ShardFile, caption_rows, has_text, rows_digest
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources.base import Shard, Source
from llm2clip_plugin.data.workers import cores, parallel
from llm2clip_plugin.files import ContractError

FEW_SAMPLES = 16384  # samples that this process compares alone, without a pool
SAVE_EVERY = 30.0  # seconds between writes of what was compared, so that a killed start does not start over

OpenShard = Callable[[str], ShardFile]


def check_captions(
    source: Source,
    entries: Mapping[str, Mapping[str, Any]],
    open_shard: OpenShard,
    *,
    full: bool = False,
) -> None:
    """Compare a source with a cache's manifest entries: shard names, counts, and the digests of keys and captions.

    Captions are read where no digest shows that the cache has them; all of them with ``full``. Raises ContractError at
    the first difference, with both values.
    """
    for shard in source.shards:
        entry = entries.get(shard.name)
        if entry is None or entry["samples"] != shard.size:
            file = open_shard(shard.name)  # raises for an unknown shard
            raise ContractError(
                f"{file.path}: shard {shard.name!r} has {shard.size} samples in {source.path}, {file.samples} "
                f"when it was embedded; {REDO}"
            )
    if source.side_folder is None:
        _compare_all(source, source.shards, open_shard, full=full)
    elif full or _unproven(source, entries):
        with source.side_folder.lock(f"compare {source.path} with its embeddings"):
            _compare_all(source, source.shards if full else _unproven(source, entries), open_shard, full=full)


def kept_digests(source: Source) -> dict[str, str]:
    """Digest of each shard of a source whose file is still the one that was read."""
    return {name: fits[0] for name, fits in _known(source).items()}


def keep_digests(source: Source, digests: Mapping[str, str]) -> None:
    """Record the digests of some shards for the next start."""
    if source.side_folder is not None and digests:
        with source.side_folder.lock(f"record the digests of {source.path}"):
            _record(source, {name: (digest, digest) for name, digest in digests.items()})


def _known(source: Source) -> dict[str, list[str]]:
    """For each shard whose file is the one that was read: its digest, and those of caches that hold its captions."""
    recorded = source.side_folder.read_json(source.digests) if source.side_folder else {}
    known: dict[str, list[str]] = {}
    for shard, stamp in zip(source.shards, source.stamps, strict=bool(recorded)):
        entry = recorded.get(shard.name)
        if isinstance(entry, dict) and entry.get("stamp") == list(stamp) and isinstance(entry.get("fits"), list):
            known[shard.name] = [str(digest) for digest in entry["fits"]]
    return {name: fits for name, fits in known.items() if fits}


def _record(source: Source, results: Mapping[str, tuple[str, str]]) -> None:
    """Add (digest, digest of a cache that has these captions) of some shards; the lock is held."""
    if source.side_folder is None or not results:
        return
    known, stamps = _known(source), dict(zip((shard.name for shard in source.shards), source.stamps, strict=True))
    entries = {}
    for name, (digest, in_cache) in results.items():
        others = known.get(name, [digest])
        others = {*others, in_cache} if others[0] == digest else {in_cache}
        entries[name] = {"stamp": list(stamps[name]), "fits": [digest, *sorted(others - {digest})]}
    source.side_folder.add_json(source.digests, entries)


def _unproven(source: Source, entries: Mapping[str, Mapping[str, Any]]) -> list[Shard]:
    """The shards without a recorded digest that says that the cache has their captions."""
    known = _known(source)
    return [shard for shard in source.shards if entries[shard.name]["rows_sha256"] not in known.get(shard.name, ())]


def _compare_all(source: Source, shards: Sequence[Shard], open_shard: OpenShard, *, full: bool) -> None:
    """Compare the captions of these shards with the cache, from all cores if there is much to read; record digests."""
    results: dict[str, tuple[str, str]] = {}
    written, total = time.monotonic(), sum(shard.size for shard in shards)
    job = partial(_compare, source, open_shard, full)
    compared = parallel(job, shards, processes=min(cores(), len(shards)) if total > FEW_SAMPLES else 1)
    try:
        with progress_bar(total=total, label="compare captions", unit="samples") as bar:
            for shard, result in zip(shards, compared, strict=True):
                results[shard.name] = result
                bar.update(shard.size)
                if time.monotonic() > written + SAVE_EVERY:
                    _record(source, results)
                    results, written = {}, time.monotonic()
    finally:
        _record(source, results)


def _compare(source: Source, open_shard: OpenShard, full: bool, shard: Shard) -> tuple[str, str]:
    """Digests of a shard's captions and of the cache's; ContractError at the first caption that the cache lacks."""
    keys, captions = shard_captions(source, shard)
    file = open_shard(shard.name)
    digest, in_cache = rows_digest(keys, caption_rows(captions)), file.meta["rows_sha256"]
    if full or digest != in_cache:
        for index, (key, texts) in enumerate(zip(keys, captions, strict=True)):
            file.row_numbers(index, list(filter(has_text, texts)), key)
    return digest, in_cache


def shard_captions(source: Source, shard: Shard) -> tuple[list[str], list[tuple[Caption, ...]]]:
    """Keys and captions of a shard's samples; an unreadable sample has a key and no captions."""
    samples = [source.captions(number) for number in range(shard.start, shard.start + shard.size)]
    return [key for key, _ in samples], [captions for _, captions in samples]
