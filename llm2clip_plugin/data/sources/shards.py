"""The tars of a path or URL, and the folder that they are in."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.data.sources.tar_scan import IMAGE_EXTENSIONS
from llm2clip_plugin.data.sources.urls import expand_braces, is_url, list_urls

LOOKED_AT = 10_000  # files of a folder without tars


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
    return path if os.path.isdir(path) else _common_folder(tars)


def data_folder(path: str) -> Path:
    """The local folder of the data at ``path``, which shard names are relative to and caches are kept in.

    For braces and wildcards that match several folders it is their longest common one. Raises ValueError for a URL.
    """
    if is_url(path):
        raise ValueError(f"{path} is not a local folder")
    if os.path.isdir(path):
        return Path(path)
    return Path(_common_folder(_expand(path)) or path[: path.startswith("/")])


def _expand(pattern: str) -> list[str]:
    """Local paths that match braces and wildcards; a pattern without a match is returned unchanged."""
    return [
        path
        for one in expand_braces(pattern)
        for path in (glob.has_magic(one) and sorted(glob.glob(one, recursive=True))) or [one]
    ]


def _common_folder(files: Sequence[str]) -> str:
    """The longest folder that all ``files`` are below; "" if they share none."""
    folders = [file.rpartition("/")[0].split("/") for file in files]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in same)


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
