"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from typing import Any

from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, SourceFormat
from llm2clip_plugin.data.sources.records import BrokenSample, Record
from llm2clip_plugin.data.sources.shards import use_tar
from llm2clip_plugin.data.sources.tar_index import make_entry
from llm2clip_plugin.data.sources.tar_scan import ABSENT
from llm2clip_plugin.data.sources.tar_set import TarSet, open_tars
from llm2clip_plugin.data.sources.urls import has_suffix, is_url

OPEN_FILES = 64  # tars held open by one process


class TarSource(Source):
    """Samples of tars in a folder, or of the local copies of tars at a URL.

    A broken shard raises BrokenShard, or, if ``broken_shards`` is given, is noted there (name -> reason) and left out.
    """

    def __init__(
        self, config: SourceConfig, broken_shards: dict[str, str] | None = None, opened: TarSet | None = None
    ) -> None:
        self._handles: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor, last used last
        self._downloads = config.downloads
        self._set = opened or open_tars(config.path, self._downloads, broken_shards)
        table, shards, start = self._set.index.table, [], 0
        for name, samples in zip(table.names, table.samples, strict=True):
            shards.append(Shard(name, samples, start))
            start += samples
        super().__init__(config, tuple(shards))
        self.kept, self.stamps = self._set.kept, table.stamps
        if start == 0 and not table.broken:
            raise ValueError(f"{config.path}: none of the {len(shards)} tars has an image, .txt or .json member")

    def __reduce__(self) -> tuple[type[TarSource], tuple[SourceConfig, None, TarSet]]:
        return TarSource, (self.config, None, self._set)

    def __del__(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def download(self, shard: int) -> bool:
        tar = self._set.tars[shard]
        return is_url(tar) and bool(self._downloads.fetch(tar))

    def download_bytes(self, shards: Iterable[int]) -> int:
        return sum(self.stamps[shard][0] for shard in shards if is_url(self._set.tars[shard]))

    def record(self, number: int) -> Record:
        shard, within = self.place(number)
        columns, key = self._set.index.row(shard, within)
        entry, name = make_entry(columns[:6], key), self.shards[shard].name
        meta: dict[str, Any] = {}
        if entry.json[0] != ABSENT:
            data = self._read(shard, *entry.json)
            try:
                meta = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise BrokenSample(name, entry.key, f"its .json is not valid JSON: {error}") from error
            if not isinstance(meta, dict):
                raise BrokenSample(name, entry.key, f"its .json contains a {type(meta).__name__}, expected an object")
        values = meta
        if entry.text[0] != ABSENT:
            values = {**meta, "txt": self._read(shard, *entry.text).decode("utf-8", "replace")}
        return Record(entry.key, values, meta, partial(self._read_image, shard, entry.key, *entry.image))

    def _read_image(self, shard: int, key: str, offset: int, size: int) -> bytes:
        if offset == ABSENT:
            raise BrokenSample(self.shards[shard].name, key, "no .jpg, .png or .webp in the tar")
        return self._read(shard, offset, size)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes of a tar; by position, so that forked workers can share a descriptor."""
        descriptor = self._handles.get(shard)
        if descriptor is None:
            descriptor = self._handles[shard] = self._open(shard)
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(shard)
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise ValueError(
                f"{self._set.tars[shard]} was truncated while being read: "
                f"got {len(data)} of {size} bytes at byte {offset}"
            )
        return data

    def _open(self, shard: int) -> int:
        """A descriptor of the tar, whose size must be the indexed one."""
        tar, expected = self._set.tars[shard], self.stamps[shard][0]
        descriptor = use_tar(self._downloads, tar, lambda path: os.open(path, os.O_RDONLY))
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            copy = f"delete {self._downloads.local_path(tar)} and its index, and " if is_url(tar) else ""
            raise ValueError(f"{tar} was replaced: {size} bytes, {expected} when it was indexed; {copy}restart")
        return descriptor


def _holds_tars(path: str) -> bool:
    """Whether a path is a .tar, a wildcard or braces, or a folder or URL, which may hold anything."""
    return has_suffix(path, ".tar") or os.path.isdir(path) or is_url(path) or bool({*path} & {*"*{"})


SOURCE = SourceFormat(
    name="webdataset",
    help="a .tar, or a folder of .tar shards",
    recognizes=_holds_tars,
    open=TarSource,
    fallback=True,
)
