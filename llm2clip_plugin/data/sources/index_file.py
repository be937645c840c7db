"""One index of a whole source: a line for each shard, read at the start, and a row for each sample, read on demand.

```
head      256 bytes: JSON with the kind, the columns, where the table is, and the SHA-256 of the table
chunks    of each shard: (samples, columns + 1) int64 rows, then its text: keys, or samples as JSON
table     JSON: names, stamps, samples, starts of the chunks, sizes of the texts
```

The last column of a row is a checksum of the row, its number and its piece of text, so a damaged or exchanged row is
noticed when it is read. One descriptor and no map serve any number of shards and samples.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.retry import SteadyFile

FORMAT = {"kind": "llm2clip-source-index", "format_version": 1}
HEAD_BYTES = 256

Stamp = tuple[int, int]  # size in bytes and modification time in ns of the file that was indexed


class DamagedIndex(ValueError):  # noqa: N818
    """An index file whose contents don't fit their checksums."""


@dataclass
class Table:
    """What an index says about shards; one entry a shard in every list."""

    names: list[str] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # byte of the shard's chunk
    text_bytes: list[int] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # shards that can't be read, which are in no list -> reason


@dataclass(frozen=True)
class ShardRows:
    """One shard to be written to an index."""

    name: str
    stamp: Stamp
    rows: np.ndarray  # (samples, columns) int64; the last two columns are start and size of the sample's text
    text: bytes


def write_index(path: Path, shards: Iterable[ShardRows], broken: dict[str, str], columns: int) -> None:
    """Write an index, reading ``shards`` once; ``broken`` is used after the last of them."""
    table = Table(broken=broken)
    with open(path, "wb") as file:
        file.write(b" " * HEAD_BYTES)
        for shard in shards:
            table.names.append(shard.name)
            table.stamps.append(shard.stamp)
            table.samples.append(len(shard.rows))
            table.starts.append(file.tell())
            table.text_bytes.append(len(shard.text))
            file.write(_with_checksums(shard.rows, shard.text, columns).tobytes())
            file.write(shard.text + b"\0" * (-len(shard.text) % 8))
        start, text = file.tell(), canonical_json(asdict(table)).encode()
        file.write(text)
        head = {**FORMAT, "columns": columns, "table": [start, len(text)], "sha256": sha256_text(text.decode())}
        file.seek(0)
        file.write(canonical_json(head).encode().ljust(HEAD_BYTES - 1) + b"\n")


def _with_checksums(rows: np.ndarray, text: bytes, columns: int) -> np.ndarray:
    out = np.zeros((len(rows), columns + 1), dtype="<i8")
    if len(rows):
        out[:, :columns] = rows
    values, size = out[:, :columns].tobytes(), columns * 8
    starts, sizes = out[:, columns - 2].tolist(), out[:, columns - 1].tolist()
    out[:, columns] = [
        zlib.crc32(text[start : start + length], zlib.crc32(values[n * size : (n + 1) * size], n))
        for n, (start, length) in enumerate(zip(starts, sizes, strict=True))
    ]
    return out


class IndexFile:
    """An index, opened for reading; raises DamagedIndex if it is truncated or its table is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SteadyFile(path)
        try:
            self.columns, self.table = self._read_table()
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedIndex(f"{path} is damaged ({error})") from error
        self._row_bytes = (self.columns + 1) * 8

    def _read_table(self) -> tuple[int, Table]:
        head: dict[str, Any] = json.loads(self._file.read(HEAD_BYTES, 0))
        if any(head.get(name) != value for name, value in FORMAT.items()):
            raise ValueError(f"kind {head.get('kind')!r}, version {head.get('format_version')!r}")
        start, size = head["table"]
        text = self._file.read(size + 1, start)  # a byte more would be too many
        if len(text) != size:
            raise ValueError("truncated")
        if sha256_text(text.decode()) != head["sha256"]:
            raise ValueError("its table has another SHA-256")
        table = Table(**json.loads(text))
        table.stamps = [(size, time) for size, time in table.stamps]
        return head["columns"], table

    def row(self, shard: int, number: int) -> tuple[tuple[int, ...], bytes]:
        """The columns of a sample of a shard, and its text. Raises DamagedIndex."""
        start, samples = self.table.starts[shard], self.table.samples[shard]
        row = self._file.read(self._row_bytes, start + number * self._row_bytes)
        *values, checksum = np.frombuffer(row, dtype="<i8").tolist() if len(row) == self._row_bytes else (0, 0, -1)
        text_start, text_size = values[-2:]
        text = b""
        if text_size > 0 and 0 <= text_start <= self.table.text_bytes[shard] - text_size:
            text = self._file.read(text_size, start + samples * self._row_bytes + text_start)
        if zlib.crc32(text, zlib.crc32(row[:-8], number)) != checksum:
            raise DamagedIndex(
                f"{self.path} is damaged (row {number} of shard {self.table.names[shard]!r}); {self._remove()}"
            )
        return tuple(values), text

    def _remove(self) -> str:
        """Remove the file, which this and other processes keep open, so that the next start builds it; what to do."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            return "delete it and restart"
        return "it was removed: restart, and it is built again"


def stamps_of(paths: Sequence[str]) -> list[Stamp | None]:
    """Size and time of each file, None for a missing one; folders are listed, which network disks answer at once."""
    by_folder: dict[str, dict[str, Stamp | None]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder or ("/" if path.startswith("/") else "."), {})[name] = None
    for folder, files in by_folder.items():
        if len(files) == 1:
            (name,) = files
            files[name] = stamp_of(os.path.join(folder, name))
            continue
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name in files:
                        files[entry.name] = stamp_of(entry)
        except FileNotFoundError:
            continue
    return [
        by_folder[folder or ("/" if path.startswith("/") else ".")][name]
        for path in paths
        for folder, _, name in (path.rpartition("/"),)
    ]


def stamp_of(file: str | os.PathLike[str] | os.DirEntry[str]) -> Stamp | None:
    """Size and time of a file; None if there is none."""
    try:
        status = file.stat() if isinstance(file, os.DirEntry) else os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns
