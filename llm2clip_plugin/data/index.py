"""The index of a source: a table with an entry for each shard, and a row for each sample, read on
demand.

```
head      256 bytes: JSON with the kind, the columns, where the table is, and the table's SHA-256
chunks    of each shard: (samples, columns) int64 rows, then its text: keys, or samples as JSON
table     JSON: names, stamps, samples, starts of the chunks, sizes of the texts
```

The last two columns are start and size of the sample's text. One descriptor and no map serve any
number of shards. Chunks of new shards and another table are appended, and then the head names that
table: what was there stays in place.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from llm2clip_plugin.data.remote import RetryingFile, SideFolder, Stamp
from llm2clip_plugin.hashes import canonical_json, sha256_text

log = logging.getLogger(__name__)

FORMAT = {"kind": "llm2clip-source-index", "format_version": 2}
HEAD_BYTES = 256


@dataclass
class Table:
    """What an index says about shards; one entry a shard in every list."""

    names: list[str] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # byte of the shard's chunk
    text_bytes: list[int] = field(default_factory=list)

    def add(self, *entry: Any) -> None:
        """Add a shard."""
        for values, value in zip(vars(self).values(), entry, strict=True):
            values.append(value)

    def entry(self, shard: int) -> list[Any]:
        """What ``add`` takes of a shard."""
        return [values[shard] for values in vars(self).values()]


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard."""

    name: str
    stamp: Stamp
    rows: np.ndarray  # (samples, columns) int64
    text: bytes


# rows, or the number of an unchanged shard in the index before
Shards: TypeAlias = Iterator[ShardRows | int]


def write_index(
    path: Path, shards: Shards, columns: int, old: IndexFile | None
) -> BaseException | None:
    """Write an index, reading ``shards`` once; returns the error that ended them after the first
    one. ``old``: what numbers among them are of; extended if ``path`` is its own."""
    table = Table()
    failure = None
    extended = old if old and old.path == path else None
    with open(path, "r+b" if extended else "wb") as file:
        file.seek(extended.end if extended else HEAD_BYTES)
        while True:
            try:
                shard = next(shards, None)
            except BaseException as error:
                if not table.names:
                    raise
                shard = None
                failure = error
            if shard is None:
                break
            if extended and isinstance(shard, int):
                table.add(*extended.table.entry(shard))
                continue
            if old and isinstance(shard, int):
                shard = old.shard(shard)
            assert isinstance(shard, ShardRows)
            start = file.tell()
            table.add(shard.name, shard.stamp, len(shard.rows), start, len(shard.text))
            file.write(shard.rows.astype("<i8").tobytes() + shard.text)
        start = file.tell()
        text = canonical_json(asdict(table)).encode()
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        head = {
            **FORMAT,
            "columns": columns,
            "table": [start, len(text)],
            "sha256": sha256_text(text.decode()),
        }
        file.seek(0)
        file.write(canonical_json(head).encode().ljust(HEAD_BYTES - 1) + b"\n")
    return failure


class IndexFile:
    """An index, opened for reading; ValueError if it is truncated or its table is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RetryingFile(path)
        try:
            head: dict[str, Any] = json.loads(self._file.read(HEAD_BYTES, 0))
            if any(head.get(name) != value for name, value in FORMAT.items()):
                raise ValueError(
                    f"kind {head.get('kind')!r}, version {head.get('format_version')!r}"
                )
            start, size = head["table"]
            text = self._file.read(size, start).decode()
            if sha256_text(text) != head["sha256"]:
                raise ValueError("its table has another SHA-256")
            self.columns: int = head["columns"]
            self.end = start + size  # byte after the table
            self.table = Table(**json.loads(text))
            self.table.stamps = [(size, time) for size, time in self.table.stamps]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error

    def __reduce__(self) -> tuple[type[IndexFile], tuple[Path]]:
        return IndexFile, (self.path,)

    @property
    def is_sparse(self) -> bool:
        """Whether less than half of the file is what its table names."""
        row_bytes = 8 * self.columns * sum(self.table.samples)
        named = row_bytes + sum(self.table.text_bytes)
        return 2 * named < self.end

    def row(self, shard: int, number: int) -> tuple[list[int], bytes]:
        """The columns of a sample of a shard, and its text. Raises ValueError for values that no
        file can have."""
        start = self.table.starts[shard]
        row_bytes = 8 * self.columns
        text_bytes = self.table.text_bytes[shard]
        file_bytes, _ = self.table.stamps[shard]
        row = self._file.read(row_bytes, start + number * row_bytes)
        is_damaged = len(row) != row_bytes
        values: list[int] = []
        if not is_damaged:
            values = np.frombuffer(row, dtype="<i8").tolist()
            is_damaged = (
                min(values) < -1
                or max(values) > max(file_bytes, text_bytes)
                or values[-1] > text_bytes
            )
        if is_damaged:
            raise ValueError(
                f"{self.path} is damaged (row {number} of shard {shard}); delete it and restart"
            )
        text_start, text_size = values[-2:]
        if not text_size:
            return values, b""
        texts_start = start + self.table.samples[shard] * row_bytes
        return values, self._file.read(text_size, texts_start + text_start)

    def columns_of(self, number: int) -> np.ndarray:
        """The rows of a shard without its text: (samples, columns) int64."""
        size = self.table.samples[number] * 8 * self.columns
        data = self._file.read(size, self.table.starts[number])
        return np.frombuffer(data, dtype="<i8").reshape(-1, self.columns)

    def shard(self, number: int) -> ShardRows:
        """All rows of a shard."""
        table = self.table
        row_bytes = 8 * self.columns
        size = table.samples[number] * row_bytes
        data = self._file.read(size + table.text_bytes[number], table.starts[number])
        rows = np.frombuffer(data[:size], dtype="<i8").reshape(-1, self.columns)
        return ShardRows(table.names[number], table.stamps[number], rows, data[size:])


def open_index(
    folder: SideFolder,
    name: str,
    columns: int,
    *,
    is_current: Callable[[Table], bool],
    build: Callable[[IndexFile | None], Shards],
    doing: str,
) -> IndexFile:
    """The index ``name`` of a folder, built by one of the processes that open it if it is not
    current. build: the shards of a new index, given the one that is there, which is extended unless
    no lock protects it or most of it is of shards that are gone."""
    for index in _readable(folder, name, columns):
        if is_current(index.table):
            return index
    with folder.lock(doing) as locked_folder:
        readable = _readable(folder, name, columns, warn=True)
        for index in readable:
            if is_current(index.table):
                return index  # another process has built it
        old = readable[0] if readable else None
        failure: BaseException | None = None

        def write(path: Path) -> None:
            nonlocal failure
            failure = write_index(path, build(old), columns, old)

        if (
            old
            and old.path.parent == locked_folder
            and not old.is_sparse
            and os.access(old.path, os.W_OK)
        ):
            write(old.path)
            written = old.path
        else:
            written = folder.write(name, write)
        if failure:  # what was read before stays for the next start
            raise failure
        return IndexFile(written)


def _readable(
    folder: SideFolder, name: str, columns: int, *, warn: bool = False
) -> list[IndexFile]:
    indexes: list[IndexFile] = []
    for path in folder.paths(name):
        try:
            indexes.append(IndexFile(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            if warn:
                log.warning("%s; the index is built again", error)
    return [index for index in indexes if index.columns == columns]
