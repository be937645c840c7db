"""WebDataset tars as img2dataset writes them: KEY.jpg with KEY.txt and/or KEY.json, read in any order."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.file_system import is_network
from llm2clip_plugin.data.retry import RetryingFile
from llm2clip_plugin.data.sources.base import Source, SourceConfig, SourceFormat, shards_of
from llm2clip_plugin.data.sources.downloads import Result
from llm2clip_plugin.data.sources.records import BrokenSample, Sample
from llm2clip_plugin.data.sources.tar_scan import ABSENT, BLOCK, Part, is_header_of
from llm2clip_plugin.data.sources.tar_set import TarSet, open_tars, use_tar
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
        self._files: OrderedDict[int, RetryingFile] = OrderedDict()  # shard number -> its tar, last used last
        self._downloads = config.downloads
        self._set = opened or open_tars(config.path, self._downloads, broken_shards)
        table = self._set.index.table
        super().__init__(config, shards_of(table.names, table.samples))
        self.side_folder, self.stamps = self._set.side_folder, table.stamps
        if not len(self) and not broken_shards:
            raise ValueError(
                f"{config.path}: none of the {len(self.shards)} tars has an image, .txt or .json member; a member's "
                "key ends at its first dot (WebDataset's rule), so 'a.b.jpg' is no .jpg: rename such members"
            )

    def __reduce__(self) -> tuple[type[TarSource], tuple[SourceConfig, None, TarSet]]:
        return TarSource, (self.config, None, self._set)

    def fetch(self, shard: int) -> None:
        tar = self._set.tars[shard]
        if is_url(tar):
            self._downloads.fetch(tar)
        elif self._on_network:
            file = RetryingFile(tar)
            for start in range(0, self.stamps[shard][0], PIECE):
                file.read(PIECE, start)

    def bytes_to_fetch(self, shards: Iterable[int]) -> int:
        return sum(self.stamps[shard][0] for shard in shards if self._on_network)

    @cached_property
    def _on_network(self) -> bool:
        return is_network(self.path)

    def key(self, number: int) -> str:
        return self._set.index.row(*self.place(number))[1].decode()

    def use_shard(self, shard: int, action: Callable[[Path], Result]) -> Result:
        """``action`` on the tar of a shard as a local file, downloaded if it is at a URL."""
        return use_tar(self._downloads, self._set.tars[shard], action)

    def record(self, number: int, *, image: bool = False) -> Sample:
        shard, within = self.place(number)
        columns, text = self._set.index.row(shard, within)
        key, name = text.decode(), self.shards[shard].name
        picture, caption, fields = zip(columns[0:6:2], columns[1:6:2], strict=True)  # (offset, size) of each part
        wanted = [part for part in (fields, caption, *[picture] * image) if part[0] != ABSENT]
        contents = self._read(shard, key, wanted)
        meta: dict[str, Any] = {}
        if fields in contents:
            try:
                meta = json.loads(contents[fields])
            except (ValueError, RecursionError) as error:
                raise BrokenSample(name, key, f"its .json is not valid JSON: {error}") from error
            if not isinstance(meta, dict):
                raise BrokenSample(name, key, f"its .json contains a {type(meta).__name__}, expected an object")
        values = meta
        if caption in contents:
            values = {**meta, "txt": contents[caption].decode("utf-8", "replace")}
        return Sample(key, values, meta, partial(self._image, shard, key, picture, contents.get(picture)))

    def _image(self, shard: int, key: str, part: Part, data: bytes | None) -> bytes:
        """The image, which ``data`` is if it was read with the sample."""
        if part[0] == ABSENT:
            raise BrokenSample(self.shards[shard].name, key, "no .jpg, .png or .webp in the tar")
        return self._read(shard, key, [part])[part] if data is None else data

    def _read(self, shard: int, key: str, parts: Sequence[Part]) -> dict[Part, bytes]:
        """Parts of a sample, neighbors in one read. BrokenSample unless their headers in the tar are the sample's."""
        contents: dict[Part, bytes] = {}
        for span in join_parts(parts):
            start, stop = span[0][0] - BLOCK, sum(span[-1])
            data = self._file(shard).read(stop - start, start)
            if len(data) != stop - start:
                raise ValueError(f"{self._set.tars[shard]} was truncated while being read")
            for offset, size in span:
                at = offset - start
                if not is_header_of(data[at - BLOCK : at], key, size):
                    raise BrokenSample(
                        self.shards[shard].name,
                        key,
                        f"the tar has another member at byte {offset}: it was changed after it was indexed; delete "
                        f"{self._set.index.path} and restart",
                    )
                contents[offset, size] = data[at : at + size]
        return contents

    def _file(self, shard: int) -> RetryingFile:
        if shard not in self._files:
            self._files[shard] = RetryingFile(self._set.tars[shard], partial(self._open, shard))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, shard: int) -> int:
        """A descriptor of the tar, whose size must be the indexed one."""
        tar, expected = self._set.tars[shard], self.stamps[shard][0]
        descriptor = use_tar(self._downloads, tar, lambda path: os.open(path, os.O_RDONLY))
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            copy = f"delete {self._downloads.local_path(tar)} and " if is_url(tar) else ""
            raise ValueError(f"{tar} was replaced: {size} bytes, {expected} when it was indexed; {copy}restart")
        return descriptor


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
