"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from typing import Any

from llm2clip_plugin.data.sources.base import RawSample, Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.data.sources.remote import is_url
from llm2clip_plugin.data.sources.shards import list_tars, open_tar, prepare_tars, use_tar
from llm2clip_plugin.data.sources.tar_index import TarIndex
from llm2clip_plugin.data.sources.tar_scan import ABSENT, BrokenShard

OPEN_FILES = 64  # tars held open by one process


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
        prepare_tars([tar for _, tar in self._tars], self._downloads)
        shards, good, start = [], [], 0
        for name, tar in self._tars:
            try:
                index = open_tar(self._downloads, tar)
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
            data = self._read(shard, *entry.json)
            try:
                values = json.loads(data)
            except (ValueError, RecursionError) as error:
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

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes of a tar; by position, so that forked workers may share a descriptor."""
        descriptor = self._handles.get(shard)
        if descriptor is None:
            descriptor = self._handles[shard] = self._open(shard)
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(shard)
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            name = self.shards[shard].name
            raise ValueError(f"shard {name!r} shrank while it was read: {len(data)} of {size} bytes at {offset}")
        return data

    def _open(self, shard: int) -> int:
        """A descriptor of the tar, which must have the size that was indexed."""
        tar, expected = self._tars[shard][1], self._indexes[shard].tar_size
        descriptor = use_tar(self._downloads, tar, lambda path: os.open(path, os.O_RDONLY))
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            raise ValueError(
                f"{tar} has {size} bytes, {expected} when it was indexed: it was replaced; start again"
                + (f" after removing {self._downloads.local_path(tar)} and its index" if is_url(tar) else "")
            )
        return descriptor
