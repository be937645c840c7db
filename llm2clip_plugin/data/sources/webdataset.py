"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.file_system import is_network
from llm2clip_plugin.data.retry import SteadyFile
from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, SourceFormat
from llm2clip_plugin.data.sources.downloads import Result
from llm2clip_plugin.data.sources.records import BrokenSample, Record, Sample
from llm2clip_plugin.data.sources.shards import use_tar
from llm2clip_plugin.data.sources.tar_index import make_entry
from llm2clip_plugin.data.sources.tar_scan import ABSENT, BLOCK, Entry, Part, is_header_of
from llm2clip_plugin.data.sources.tar_set import TarSet, open_tars
from llm2clip_plugin.data.sources.urls import has_suffix, is_url

OPEN_FILES = 64  # tars held open by one process
PIECE = 4 << 20  # bytes of one read of an entire shard
GAP = 64 << 10  # bytes between two parts of a sample that are read too: a second read of a network disk costs more


class TarSource(Source):
    """Samples of tars in a folder, or of the local copies of tars at a URL.

    A broken shard raises BrokenShard, or, if ``broken_shards`` is given, is noted there (name -> reason) and left out.
    """

    def __init__(
        self, config: SourceConfig, broken_shards: dict[str, str] | None = None, opened: TarSet | None = None
    ) -> None:
        self._files: OrderedDict[int, SteadyFile] = OrderedDict()  # shard number -> its tar, last used last
        self._downloads = config.downloads
        self._set = opened or open_tars(config.path, self._downloads, broken_shards)
        table, shards, start = self._set.index.table, [], 0
        for name, samples in zip(table.names, table.samples, strict=True):
            shards.append(Shard(name, samples, start))
            start += samples
        super().__init__(config, tuple(shards))
        self.kept, self.stamps = self._set.kept, table.stamps
        if start == 0 and not table.broken:
            raise ValueError(
                f"{config.path}: none of the {len(shards)} tars has an image, .txt or .json member; a member's key "
                "ends at its first dot (WebDataset's rule), so 'a.b.jpg' is no .jpg: rename such members"
            )

    def __reduce__(self) -> tuple[type[TarSource], tuple[SourceConfig, None, TarSet]]:
        return TarSource, (self.config, None, self._set)

    def fetch(self, shard: int) -> None:
        tar = self._set.tars[shard]
        if is_url(tar):
            self._downloads.fetch(tar)
        elif self._on_network:
            with closing(SteadyFile(tar)) as file:
                for start in range(0, self.stamps[shard][0], PIECE):
                    file.read(PIECE, start)

    def bytes_to_fetch(self, shards: Iterable[int]) -> int:
        return sum(self.stamps[shard][0] for shard in shards if self._on_network)

    @cached_property
    def _on_network(self) -> bool:
        return is_network(self.path)

    def key(self, number: int) -> str:
        shard, within = self.place(number)
        columns, key = self._set.index.row(shard, within)
        return make_entry(columns[:6], key).key

    def use_shard(self, shard: int, action: Callable[[Path], Result]) -> Result:
        """``action`` on the tar of a shard as a local file, downloaded if it is at a URL."""
        return use_tar(self._downloads, self._set.tars[shard], action)

    def record(self, number: int) -> Record:
        return self._record(number, with_image=False)

    def record_with_image(self, number: int) -> Record:
        return self._record(number, with_image=True)

    def with_image(self, number: int) -> Sample:
        return self._sample(number, self.record_with_image(number))

    def _record(self, number: int, *, with_image: bool) -> Record:
        shard, within = self.place(number)
        columns, key = self._set.index.row(shard, within)
        entry, name = make_entry(columns[:6], key), self.shards[shard].name
        wanted = (entry.json, entry.text, entry.image) if with_image else (entry.json, entry.text)
        parts = self._read(shard, entry.key, [part for part in wanted if part[0] != ABSENT])
        meta: dict[str, Any] = {}
        if entry.json in parts:
            try:
                meta = json.loads(parts[entry.json])
            except (ValueError, RecursionError) as error:
                raise BrokenSample(name, entry.key, f"its .json is not valid JSON: {error}") from error
            if not isinstance(meta, dict):
                raise BrokenSample(name, entry.key, f"its .json contains a {type(meta).__name__}, expected an object")
        values = meta
        if entry.text in parts:
            values = {**meta, "txt": parts[entry.text].decode("utf-8", "replace")}
        return Record(entry.key, values, meta, partial(self._image, shard, entry, parts.get(entry.image)))

    def _image(self, shard: int, entry: Entry, data: bytes | None) -> bytes:
        """The image, which ``data`` is if it was read with the sample."""
        if entry.image[0] == ABSENT:
            raise BrokenSample(self.shards[shard].name, entry.key, "no .jpg, .png or .webp in the tar")
        return self._read(shard, entry.key, [entry.image])[entry.image] if data is None else data

    def _read(self, shard: int, key: str, parts: Sequence[Part]) -> dict[Part, bytes]:
        """Parts of a sample, neighbors in one read. BrokenSample unless their headers in the tar are the sample's."""
        contents: dict[Part, bytes] = {}
        for span in join_parts(parts):
            start = max(0, span[0][0] - BLOCK)
            stop = max(offset + size for offset, size in span)
            data = self._file(shard).read(stop - start, start)
            if len(data) != stop - start:
                raise ValueError(
                    f"{self._set.tars[shard]} was truncated while being read: "
                    f"got {len(data)} of {stop - start} bytes at byte {start}"
                )
            for offset, size in span:
                at = offset - start
                if not is_header_of(data[at - BLOCK : at], key, size):
                    raise BrokenSample(self.shards[shard].name, key, self._changed(shard, offset))
                contents[offset, size] = data[at : at + size]
        return contents

    def _file(self, shard: int) -> SteadyFile:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = SteadyFile(self._set.tars[shard], partial(self._open, shard))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(shard)
        return file

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

    def _changed(self, shard: int, offset: int) -> str:
        tar = self._set.tars[shard]
        if is_url(tar):
            remedy = f"delete {self._downloads.local_path(tar)}, its index and {self._set.kept.main}, and restart"
        else:
            remedy = f"run `touch {tar}` and restart to index it again"
        return f"the tar has another member at byte {offset}: it was changed after it was indexed; {remedy}"


def join_parts(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts by offset, those with at most GAP bytes between them together."""
    spans: list[list[Part]] = []
    for part in sorted(parts):
        if spans and part[0] - sum(spans[-1][-1]) <= GAP:
            spans[-1].append(part)
        else:
            spans.append([part])
    return spans


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
