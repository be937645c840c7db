"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import glob
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.base import RawSample, Shard, Source, SourceConfig
from llm2clip_plugin.data.records import BrokenSample
from llm2clip_plugin.data.remote import expand_braces, is_url, list_urls
from llm2clip_plugin.data.tar_index import ABSENT, BrokenShard, TarIndex, open_index

OPEN_FILES = 64  # tars held open by one process


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
        tars = [found for one in expand_braces(path) for found in (sorted(glob.glob(one, recursive=True)) or [one])]
    if not tars:
        raise FileNotFoundError(f"no .tar files in {path}")
    folders = [tar.rpartition("/")[0] for tar in tars]
    base = path.rstrip("/") if os.path.isdir(path) else _common_folder(folders)
    names = [tar[len(base) :].lstrip("/").removesuffix(".tar") for tar in tars]
    if len(set(names)) < len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path} names the shards {doubled} more than once")
    return list(zip(names, tars, strict=True))


def _common_folder(folders: list[str]) -> str:
    """The longest folder that all ``folders`` begin with, by whole components."""
    parts = [folder.split("/") for folder in folders]
    same = 0
    while all(len(part) > same for part in parts) and len({part[same] for part in parts}) == 1:
        same += 1
    return "/".join(parts[0][:same])


class TarSource(Source):
    """Samples of tars in a folder or at a URL; one that lies at a URL is read from its local copy.

    A broken shard raises BrokenShard, or, if ``broken_shards`` is given, is noted there (name -> reason) and left out.
    """

    def __init__(self, config: SourceConfig, broken_shards: dict[str, str] | None = None) -> None:
        self._broken_shards = broken_shards
        self._handles: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor, last used last
        self._downloads = config.downloads
        self._tars = list_tars(config.path)
        self._indexes: list[TarIndex] = []
        shards, good, start = [], [], 0
        for name, tar in _tracked(self._tars):
            try:
                index = open_index(self._local(tar), self._downloads.folder)
            except (BrokenShard, FileNotFoundError) as error:
                if broken_shards is None:
                    raise
                broken_shards[name] = str(error)
                continue
            self._indexes.append(index)
            good.append((name, tar))
            shards.append(Shard(name, len(index), start))
            start += len(index)
        self._tars = good
        super().__init__(config, tuple(shards))
        if start == 0 and not broken_shards:
            raise ValueError(f"{config.path}: {len(shards)} tars, but no member is an image, .txt or .json")

    def __reduce__(self) -> tuple[type[TarSource], tuple[SourceConfig, dict[str, str] | None]]:
        return TarSource, (self.config, self._broken_shards)

    def __del__(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def raw(self, number: int) -> RawSample:
        shard, within = self.place(number)
        entry = self._indexes[shard][within]
        values: dict[str, Any] = {}
        if entry.json[0] != ABSENT:
            try:
                values = json.loads(self._read(shard, *entry.json))
            except ValueError as error:
                raise BrokenSample(self.shards[shard].name, entry.key, f"its .json is not JSON: {error}") from error
            if not isinstance(values, dict):
                kind = type(values).__name__
                raise BrokenSample(self.shards[shard].name, entry.key, f"its .json is a {kind}, not an object")
        meta = dict(values)
        if entry.text[0] != ABSENT:
            values["txt"] = self._read(shard, *entry.text).decode("utf-8", "replace")
        return RawSample(entry.key, values, meta)

    def image(self, number: int) -> bytes:
        shard, within = self.place(number)
        entry = self._indexes[shard][within]
        if entry.image[0] == ABSENT:
            raise BrokenSample(self.shards[shard].name, entry.key, "no .jpg, .png or .webp in the tar")
        return self._read(shard, *entry.image)

    def _local(self, tar: str) -> Path:
        if is_url(tar):
            return self._downloads.fetch(tar)
        if not os.path.isfile(tar):
            raise FileNotFoundError(f"no shard at {tar}")
        return Path(tar)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes of a tar; by position, so that forked workers may share a descriptor."""
        descriptor = self._handles.get(shard)
        if descriptor is None:
            descriptor = os.open(self._local(self._tars[shard][1]), os.O_RDONLY)
            self._handles[shard] = descriptor
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(shard)
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            name = self.shards[shard].name
            raise ValueError(f"shard {name!r} shrank while it was read: {len(data)} of {size} bytes at {offset}")
        return data


def _tracked(tars: list[tuple[str, str]]) -> Any:
    """Progress where opening may take long: downloads, or many indexes to build."""
    if len(tars) < 16 and not any(is_url(tar) for _, tar in tars):
        return tars
    from llm2clip_plugin.progress import track

    return track(tars, total=len(tars), label="open shards", unit="shards")
