"""The tars of a source with the one index of all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llm2clip_plugin.data.kept import SideFolder
from llm2clip_plugin.data.pool import cores, map_in_order, parallel
from llm2clip_plugin.data.sources.downloads import Downloads, Result
from llm2clip_plugin.data.sources.index_file import IndexFile, ShardRows, Table, open_index, stamp_of, stamps_of
from llm2clip_plugin.data.sources.shards import base_folder, list_tars
from llm2clip_plugin.data.sources.tar_scan import COLUMNS, BrokenShard, index_tar
from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.progress import track

DOWNLOADS_AT_ONCE = 4
FEW = 16  # tars that are indexed in this process, without a pool


@dataclass(frozen=True)
class TarSet:
    """Tars and their index, in the same order."""

    tars: tuple[str, ...]  # paths or URLs
    side_folder: SideFolder
    index: IndexFile


def open_tars(path: str, downloads: Downloads, broken: dict[str, str] | None) -> TarSet:
    """The tars of ``path``, downloaded if they are at a URL and indexed, by one process of those that open them.

    Raises FileNotFoundError without tars, BrokenShard for a broken one; with ``broken``, these are noted there
    (name -> reason) and left out.
    """
    listed = list_tars(path)
    tars, base = dict(listed), base_folder(path, [tar for _, tar in listed])
    pattern = path[len(base) :] if is_url(path) else os.path.relpath(path, base or ".")
    folder = SideFolder.of(base or ".", downloads.folder)
    index = open_index(
        folder,
        f"shards-{hashlib.sha256(pattern.encode()).hexdigest()[:16]}.index",
        COLUMNS,
        is_current=lambda table: table.names == list(tars) and _unchanged(table, tars, downloads) == set(tars),
        build=partial(_build, tars, downloads, broken),
        doing=f"index {path}",
    )
    return TarSet(tuple(tars[shard] for shard in index.table.names), folder, index)


def _unchanged(table: Table, tars: dict[str, str], downloads: Downloads) -> set[str]:
    """Names of the shards whose tars are those that were indexed; the copy of one at a URL may have been evicted."""
    names = [name for name in table.names if name in tars]
    files = [str(downloads.local_path(tars[name])) if is_url(tars[name]) else tars[name] for name in names]
    expected = dict(zip(table.names, table.stamps, strict=True))
    return {
        name
        for name, stamp in zip(names, stamps_of(files), strict=True)
        if stamp == expected[name] or (stamp is None and is_url(tars[name]))
    }


def _build(
    tars: dict[str, str], downloads: Downloads, broken: dict[str, str] | None, old: IndexFile | None
) -> Iterator[ShardRows]:
    """The rows of each tar, from ``old`` if it is unchanged."""
    known = _unchanged(old.table, tars, downloads) if old else set()
    place = {name: number for number, name in enumerate(old.table.names)} if old else {}
    todo = [tar for name, tar in tars.items() if name not in known]
    job = partial(_index, downloads)
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as threads:
        if any(map(is_url, todo)):
            results = map_in_order(threads, job, todo, ahead=2 * DOWNLOADS_AT_ONCE)
        else:
            results = parallel(job, todo, processes=cores() if len(todo) > FEW else 1)
        for name in track(tars, total=len(tars), label="index", unit="shards"):
            if old and name in known:
                yield old.shard(place[name])
                continue
            result = next(results)
            if isinstance(result, ShardRows):
                yield replace(result, name=name)
            elif broken is None:
                raise result
            else:
                broken[name] = str(result)


def _index(downloads: Downloads, tar: str) -> ShardRows | Exception:
    """The rows of one tar, or why there are none. A copy that is no tar is deleted."""
    try:
        return use_tar(downloads, tar, _rows)
    except (FileNotFoundError, PermissionError) as error:
        return error
    except BrokenShard as error:
        if is_url(tar):
            downloads.forget(tar)
            return BrokenShard(f"{tar}: {error}; the copy is deleted, so the next start downloads it again")
        return error


def _rows(path: Path) -> ShardRows:
    stamp = stamp_of(path)
    return ShardRows("", stamp, *index_tar(path))


def use_tar(downloads: Downloads, tar: str, action: Callable[[Path], Result]) -> Result:
    """``action`` on a tar as a local file, downloaded if it is at a URL.

    Raises FileNotFoundError if there is no such tar, PermissionError if access is denied, ConnectionError if its
    download fails.
    """
    if is_url(tar):
        return downloads.use(tar, action)
    if not os.path.isfile(tar):
        raise FileNotFoundError(f"no file at {tar}")
    return action(Path(tar))
