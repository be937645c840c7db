"""The tars of a source with the one index of all of them, which is built from the tars' own indexes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.data.kept import KeptFolder
from llm2clip_plugin.data.sources.downloads import Downloads
from llm2clip_plugin.data.sources.index_file import DamagedIndex, IndexFile, ShardRows, Table, stamps_of, write_index
from llm2clip_plugin.data.sources.shards import base_folder, list_tars, open_tar, prepare_tars
from llm2clip_plugin.data.sources.tar_index import COLUMNS, index_path
from llm2clip_plugin.data.sources.tar_scan import BrokenShard
from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.progress import track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarSet:
    """Tars and their index, in the same order."""

    tars: tuple[str, ...]  # paths or URLs
    kept: KeptFolder
    index: IndexFile

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _reopen, (self.tars, self.kept, self.index.path)


def _reopen(tars: tuple[str, ...], kept: KeptFolder, path: Path) -> TarSet:
    """In a loader process: nothing is listed or compared again."""
    return TarSet(tars, kept, IndexFile(path))


def open_tars(path: str, downloads: Downloads, broken: dict[str, str] | None) -> TarSet:
    """The tars of ``path``, downloaded if they are at a URL and indexed, by one process of those that open them.

    Raises FileNotFoundError without tars, BrokenShard for a broken one; with ``broken``, these are noted there
    (name -> reason) and left out.
    """
    listed = list_tars(path)
    base = base_folder(path, [tar for _, tar in listed])
    if is_url(path):
        kept, pattern = KeptFolder.of_url(base, downloads.folder), path[len(base) :]
    else:
        kept, pattern = KeptFolder.of(base or ".", downloads.folder), os.path.relpath(path, base or ".")
    name = f"shards-{hashlib.sha256(pattern.encode()).hexdigest()[:16]}.index"
    index = _open_current(kept, name, listed, downloads)
    if index is None:
        with kept.lock(f"index {path}"):
            index = _open_current(kept, name, listed, downloads)
            if index is None:
                index = _build(kept, name, listed, downloads, broken)
    tars = dict(listed)
    return TarSet(tuple(tars[shard] for shard in index.table.names), kept, index)


def _open_current(
    kept: KeptFolder, name: str, listed: Sequence[tuple[str, str]], downloads: Downloads
) -> IndexFile | None:
    """The index if it is of these tars as they are now."""
    for path in kept.paths(name):
        try:
            index = IndexFile(path)
        except FileNotFoundError:
            continue
        except (OSError, DamagedIndex) as error:
            log.warning("%s; the index is built again", error)
            continue
        if index.columns == COLUMNS and _is_current(index.table, listed, downloads):
            return index
    return None


def _is_current(table: Table, listed: Sequence[tuple[str, str]], downloads: Downloads) -> bool:
    if table.broken or table.names != [name for name, _ in listed]:
        return False  # a broken shard may have been replaced
    tars = [tar for _, tar in listed]
    if not any(map(is_url, tars)):
        return table.stamps == stamps_of(tars)
    copies = [downloads.local_path(tar) for tar in tars]
    files = stamps_of([*map(str, copies), *(str(index_path(copy)) for copy in copies)])
    return all(
        index is not None and (copy is None or copy[0] == expected[0])  # a copy may have been evicted
        for copy, index, expected in zip(files[: len(tars)], files[len(tars) :], table.stamps, strict=True)
    )


def _build(
    kept: KeptFolder,
    name: str,
    listed: Sequence[tuple[str, str]],
    downloads: Downloads,
    broken: dict[str, str] | None,
) -> IndexFile:
    prepare_tars([tar for _, tar in listed], downloads)
    reasons: dict[str, str] = {}

    def shards() -> Iterator[ShardRows]:
        for shard, tar in track(listed, total=len(listed), label="join the indexes", unit="shards"):
            try:
                index = open_tar(downloads, tar)
            except (BrokenShard, FileNotFoundError, PermissionError) as error:
                if broken is None:
                    raise
                reasons[shard] = str(error)
            else:
                yield ShardRows(shard, index.stamp, index.table, index.keys)

    path = kept.write(name, lambda path: write_index(path, shards(), reasons, COLUMNS))
    if broken is not None:
        broken.update(reasons)
    return IndexFile(path)
