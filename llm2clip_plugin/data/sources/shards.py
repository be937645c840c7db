"""The tars of a path or URL: listed, downloaded if they are at a URL, and indexed."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.data.pool import cores, process_pool
from llm2clip_plugin.data.sources.downloads import Downloads, Result
from llm2clip_plugin.data.sources.tar_index import TarIndex, find_index, has_index, open_index
from llm2clip_plugin.data.sources.tar_scan import IMAGE_EXTENSIONS, BrokenShard
from llm2clip_plugin.data.sources.urls import expand_braces, is_url, list_urls
from llm2clip_plugin.progress import track

DOWNLOADS_AT_ONCE = 4
LOOKED_AT = 10_000  # files of a folder without tars
FEW = 16  # shards that are indexed in this process, without a pool


def list_tars(path: str) -> list[tuple[str, str]]:
    """(shard name, path or URL) of each tar of ``path``, in order of name.

    A shard's name is its path relative to the longest folder that all tars share, without ``.tar``. Raises
    FileNotFoundError if there is none, ValueError for a duplicate name.
    """
    if is_url(path):
        tars = list_urls(path, ".tar")
    elif os.path.isdir(path):
        tars = sorted(str(file) for file in Path(path).rglob("*.tar") if not file.name.startswith("."))
    else:
        tars = _expand(path)
    if not tars:
        raise FileNotFoundError(f"no .tar files in {path}{instead_of_tars(path)}")
    base = base_folder(path, tars)
    names = [
        (tar[len(base) :].lstrip("/") if is_url(path) else os.path.relpath(tar, base or ".")).removesuffix(".tar")
        for tar in tars
    ]
    if len(set(names)) < len(names):
        duplicates = [name for name, count in sorted(Counter(names).items()) if count > 1]
        raise ValueError(f"{path} lists shards more than once: {', '.join(duplicates)}")
    return list(zip(names, tars, strict=True))


def base_folder(path: str, tars: Sequence[str]) -> str:
    """The folder or URL that shard names are relative to: ``path`` itself, or the longest one that all tars share."""
    return path if os.path.isdir(path) else _common_folder([tar.rpartition("/")[0] for tar in tars])


def data_folder(path: str) -> Path:
    """The local folder of the data at ``path``, which shard names are relative to and caches are kept in.

    For braces and wildcards that match several folders it is their longest common one. Raises ValueError for a URL.
    """
    if is_url(path):
        raise ValueError(f"{path} is not a local folder")
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        return Path(path).parent
    return Path(_common_folder([tar.rpartition("/")[0] for tar in _expand(path)]) or path[: path.startswith("/")])


def _expand(pattern: str) -> list[str]:
    """Local paths that match braces and wildcards; a pattern without a match is returned unchanged."""
    return [
        path
        for one in expand_braces(pattern)
        for path in (glob.has_magic(one) and sorted(glob.glob(one, recursive=True))) or [one]
    ]


def _common_folder(folders: list[str]) -> str:
    """The longest folder that all ``folders`` start with."""
    parts = [folder.split("/") for folder in folders]
    same = 0
    while all(len(part) > same for part in parts) and len({part[same] for part in parts}) == 1:
        same += 1
    return "/".join(parts[0][:same])


def use_tar(downloads: Downloads, tar: str, action: Callable[[Path], Result]) -> Result:
    """``action`` on a tar as a local file, downloaded if it is at a URL.

    Raises FileNotFoundError if there is no such shard, PermissionError if access is denied, ConnectionError if its
    download fails.
    """
    if is_url(tar):
        return downloads.use(tar, action)
    try:
        return action(Path(tar))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no shard at {tar}") from error


def open_tar(downloads: Downloads, tar: str) -> TarIndex:
    """The index of one tar. A tar at a URL whose index is kept is not downloaded for it.

    Raises BrokenShard, and what ``use_tar`` raises.
    """
    if is_url(tar) and not downloads.local_path(tar).exists():
        index = find_index(downloads.local_path(tar), downloads.folder)
        if index is not None:
            return index
    try:
        return use_tar(downloads, tar, lambda path: open_index(path, downloads.folder))
    except BrokenShard as error:
        if not is_url(tar):
            raise
        downloads.forget(tar)
        raise BrokenShard(f"{tar}: {error}; the copy is deleted, so the next start downloads it again") from error


def prepare_tars(tars: Sequence[str], downloads: Downloads) -> None:
    """Download and index many tars in parallel, with a progress bar; ``open_tar`` then finds each index."""
    remote = any(is_url(tar) for tar in tars)
    missing = [tar for tar in tars if not has_index(_local_name(tar, downloads), downloads.folder)]
    if not missing or (len(missing) <= FEW and not remote):
        return
    pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE) if remote else process_pool(cores())
    with pool as executor:
        at_once = 1 if remote else max(1, min(32, len(missing) // (8 * cores())))
        done = executor.map(partial(_prepare, downloads), missing, chunksize=at_once)
        for _ in track(done, total=len(missing), label="download and index" if remote else "index", unit="shards"):
            pass


def _local_name(tar: str, downloads: Downloads) -> Path:
    return downloads.local_path(tar) if is_url(tar) else Path(tar)


def _prepare(downloads: Downloads, tar: str) -> None:
    try:
        open_tar(downloads, tar)
    except (BrokenShard, FileNotFoundError, PermissionError):
        pass  # open_tar raises it again, in order of the shards


def instead_of_tars(path: str) -> str:
    """What to do with the files that a folder, or a path itself, has instead of tars; "" if that is not known."""
    root = Path(path)
    files = [root] if root.is_file() else itertools.islice(root.rglob("*"), LOOKED_AT) if root.is_dir() else []
    found = {file.suffix.lower(): file for file in files if not file.name.startswith(".")}
    for ending, file in found.items():
        if re.search(r"\.(tgz|tar\.\w+)$", file.name.lower()):
            return f"; {file.name} is compressed: decompress it to a .tar, its images are compressed already"
        if ending in (".csv", ".tsv", ".parquet"):
            return f"; make a data set of the table: {command('data', 'make', file, '--output', 'DIR')}"
        if ending == ".jsonl":
            return f"; give the file itself: {file}"
    if any(ending.lstrip(".") in IMAGE_EXTENSIONS for ending in found):
        return f"; make a data set of the pictures: {command('data', 'make', path, '--output', 'DIR')}"
    return ""
