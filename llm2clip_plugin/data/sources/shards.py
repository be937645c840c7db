"""The tars behind a path or URL, found, downloaded where need be, and indexed."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from llm2clip_plugin.data.sources.remote import Downloads, Result, expand_braces, is_url, list_urls
from llm2clip_plugin.data.sources.tar_index import TarIndex, find_index, open_index
from llm2clip_plugin.data.sources.tar_scan import BrokenShard

DOWNLOADS_AT_ONCE = 4
FEW = 16  # shards that are indexed without starting processes


def list_tars(path: str) -> list[tuple[str, str]]:
    """(shard name, path or URL) of each tar behind ``path``, by name.

    A shard's name is its path below the part of ``path`` that has no wildcard, without ``.tar``.
    Raises FileNotFoundError if there is none.
    """
    if is_url(path):
        tars = list_urls(path, ".tar")
    elif os.path.isdir(path):
        tars = sorted(str(file) for file in Path(path).rglob("*.tar") if not file.name.startswith("."))
    else:
        tars = _spelled_out(path)
    if not tars:
        raise FileNotFoundError(f"no .tar files in {path}")
    folders = [tar.rpartition("/")[0] for tar in tars]
    base = path.rstrip("/") if os.path.isdir(path) else _common_folder(folders)
    names = [tar[len(base) :].lstrip("/").removesuffix(".tar") for tar in tars]
    if len(set(names)) < len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path} names the shards {doubled} more than once")
    return list(zip(names, tars, strict=True))


def data_folder(path: str) -> Path:
    """The local folder that holds the data at ``path``, below which shards have their names: the place of its caches.

    Of braces and wildcards that take in several folders it is the one that holds them all. ValueError for a URL.
    """
    if is_url(path):
        raise ValueError(f"{path} is not a local folder")
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        return Path(path).parent
    return Path(_common_folder([tar.rpartition("/")[0] for tar in _spelled_out(path)]) or path[: path.startswith("/")])


def _spelled_out(pattern: str) -> list[str]:
    """Local paths behind braces and wildcards; one that nothing matches stays as it is."""
    return [found for one in expand_braces(pattern) for found in (sorted(glob.glob(one, recursive=True)) or [one])]


def _common_folder(folders: list[str]) -> str:
    """The longest folder that all ``folders`` begin with, by whole components."""
    parts = [folder.split("/") for folder in folders]
    same = 0
    while all(len(part) > same for part in parts) and len({part[same] for part in parts}) == 1:
        same += 1
    return "/".join(parts[0][:same])


def use_tar(downloads: Downloads, tar: str, action: Callable[[Path], Result]) -> Result:
    """``action`` on the tar as a local file, downloaded if it lies at a URL.

    Raises FileNotFoundError if there is no such shard, ConnectionError if its download fails for good.
    """
    if is_url(tar):
        return downloads.use(tar, action)
    if not os.path.isfile(tar):
        raise FileNotFoundError(f"no shard at {tar}")
    return action(Path(tar))


def open_tar(downloads: Downloads, tar: str) -> TarIndex:
    """The index of one tar; one at a URL that was indexed before is not downloaded again for it."""
    if is_url(tar) and not downloads.local_path(tar).exists():
        index = find_index(downloads.local_path(tar), downloads.folder)
        if index is not None:
            return index
    return use_tar(downloads, tar, lambda path: open_index(path, downloads.folder))


def prepare_tars(tars: Sequence[str], downloads: Downloads) -> None:
    """Download and index many tars at once, with progress; ``open_tar`` then finds each index, or its error."""
    remote = any(is_url(tar) for tar in tars)
    missing = [tar for tar in tars if find_index(_local_name(tar, downloads), downloads.folder) is None]
    if not missing or (len(missing) <= FEW and not remote):
        return
    from llm2clip_plugin.progress import track

    pool: Executor = ThreadPoolExecutor(DOWNLOADS_AT_ONCE) if remote else ProcessPoolExecutor()
    with pool:
        done = pool.map(partial(_prepare, downloads), missing)
        for _ in track(done, total=len(missing), label="download and index" if remote else "index", unit="shards"):
            pass


def _local_name(tar: str, downloads: Downloads) -> Path:
    return downloads.local_path(tar) if is_url(tar) else Path(tar)


def _prepare(downloads: Downloads, tar: str) -> None:
    try:
        open_tar(downloads, tar)
    except (BrokenShard, FileNotFoundError):
        pass  # said again, in order, when the tar is opened
