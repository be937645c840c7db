"""The index of a source: a table with an entry for each shard, and a row for each sample, read on demand.

```
head      256 bytes: JSON with the kind, the columns, where the table is, and the SHA-256 of the table
chunks    of each shard: (samples, columns) int64 rows, then its text: keys, or samples as JSON
table     JSON: names, stamps, samples, starts of the chunks, sizes of the texts
```

The last two columns are start and size of the sample's text. One descriptor and no map serve any number of shards.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.remote import RetryingFile, SideFolder, retried

log = logging.getLogger(__name__)

FORMAT = {"kind": "llm2clip-source-index", "format_version": 2}
HEAD_BYTES = 256

Stamp = tuple[int, int]  # size in bytes and modification time in ns of the file that was indexed


@dataclass
class Table:
    """What an index says about shards; one entry a shard in every list."""

    names: list[str] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # byte of the shard's chunk
    text_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard."""

    name: str
    stamp: Stamp
    rows: np.ndarray  # (samples, columns) int64
    text: bytes


def write_index(path: Path, shards: Iterable[ShardRows], columns: int) -> None:
    """Write an index, reading ``shards`` once."""
    table = Table()
    with open(path, "wb") as file:
        file.write(b" " * HEAD_BYTES)
        for shard in shards:
            table.names.append(shard.name)
            table.stamps.append(shard.stamp)
            table.samples.append(len(shard.rows))
            table.starts.append(file.tell())
            table.text_bytes.append(len(shard.text))
            file.write(shard.rows.astype("<i8").tobytes() + shard.text)
        start, text = file.tell(), canonical_json(asdict(table)).encode()
        file.write(text)
        head = {**FORMAT, "columns": columns, "table": [start, len(text)], "sha256": sha256_text(text.decode())}
        file.seek(0)
        file.write(canonical_json(head).encode().ljust(HEAD_BYTES - 1) + b"\n")


class IndexFile:
    """An index, opened for reading; raises ValueError if it is truncated or its table is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RetryingFile(path)
        try:
            self.columns, self.table = self._read_table()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error

    def __reduce__(self) -> tuple[type[IndexFile], tuple[Path]]:
        return IndexFile, (self.path,)

    def _read_table(self) -> tuple[int, Table]:
        head: dict[str, Any] = json.loads(self._file.read(HEAD_BYTES, 0))
        if any(head.get(name) != value for name, value in FORMAT.items()):
            raise ValueError(f"kind {head.get('kind')!r}, version {head.get('format_version')!r}")
        start, size = head["table"]
        text = self._file.read(size, start).decode()
        if sha256_text(text) != head["sha256"]:
            raise ValueError("its table has another SHA-256")
        table = Table(**json.loads(text))
        table.stamps = [(size, time) for size, time in table.stamps]
        return head["columns"], table

    def row(self, shard: int, number: int) -> tuple[list[int], bytes]:
        """The columns of a sample of a shard, and its text."""
        start, row_bytes = self.table.starts[shard], 8 * self.columns
        row = self._file.read(row_bytes, start + number * row_bytes)
        values = np.frombuffer(row, dtype="<i8").tolist()
        text_start, text_size = values[-2:]
        if not text_size:
            return values, b""
        return values, self._file.read(text_size, start + self.table.samples[shard] * row_bytes + text_start)

    def shard(self, number: int) -> ShardRows:
        """All rows of a shard."""
        table, row_bytes = self.table, 8 * self.columns
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
    build: Callable[[IndexFile | None], Iterable[ShardRows]],
    doing: str,
) -> IndexFile:
    """The index ``name`` of a folder, built by one of the processes that open it if it is not current.

    build: the shards of a new index, given the one that is there.
    """
    for path in folder.paths(name):
        if (index := _open(path, columns)) is not None and is_current(index.table):
            return index
    with folder.lock(doing):
        old = None
        for path in folder.paths(name):
            index = _open(path, columns, warn=True)
            if index is not None and is_current(index.table):
                return index  # another process has built it
            old = old or index
        failures: list[BaseException] = []
        shards = partial(_until_failure, build, old, failures)
        written = folder.write(name, lambda path: write_index(path, shards(), columns))
        if failures:  # what was read before stays for the next start
            raise failures[0]
        return IndexFile(written)


def _until_failure(
    build: Callable[[IndexFile | None], Iterable[ShardRows]], old: IndexFile | None, failures: list[BaseException]
) -> Iterator[ShardRows]:
    written = 0
    try:
        for shard in build(old):
            yield shard
            written += 1
    except BaseException as error:
        if not written:
            raise
        failures.append(error)


def _open(path: Path, columns: int, *, warn: bool = False) -> IndexFile | None:
    try:
        index = IndexFile(path)
        return index if index.columns == columns else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if warn:
            log.warning("%s; the index is built again", error)
        return None


def stamps_of(paths: Sequence[str]) -> list[Stamp | None]:
    """Size and time of each file, None for a missing one; folders are listed, which network disks answer at once."""
    stamps: dict[str, Stamp | None] = dict.fromkeys(paths)
    for folder in {os.path.dirname(path) for path in paths}:
        try:
            with os.scandir(folder or ".") as entries:
                found = [(os.path.join(folder, entry.name), entry) for entry in entries]
                stamps |= {path: stamp_of(entry) for path, entry in found if path in stamps}
        except FileNotFoundError:
            continue
    return [stamps[path] for path in paths]


def stamp_of(file: Path | os.DirEntry[str]) -> Stamp:
    """Size and time of a file. Raises FileNotFoundError."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


# The samples of a tar, from its headers alone. Member names are labels: none is used as a path.

BLOCK = tarfile.BLOCKSIZE  # 512 bytes; headers and contents start on multiples of it
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # gzip, zstd
ABSENT = -1  # offset of a part that the sample does not have
PARTS = ("image", "txt", "json")
COLUMNS = 8  # offset and size of image, text and JSON; start and size of the key among all keys

Part = tuple[int, int]  # of a sample: byte of its content in the tar, and size


class BrokenShard(ValueError):  # noqa: N818
    """A tar that can't be read to its end: which one, and why."""


def scan_tar(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an uncompressed tar.

    Raises BrokenShard for another file, a damaged header, a truncated member, or a missing end-of-archive marker (a
    writer that was killed between two members), which tarfile takes for the end.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4).startswith(COMPRESSED):
                raise BrokenShard(f"{path}: is compressed; decompress it to a plain .tar")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
                for member in tar:
                    if member.issparse():
                        raise BrokenShard(f"{path}: {member.name!r} is a sparse file; write the tar without --sparse")
                    if member.size < 0:
                        raise tarfile.ReadError(f"{member.name!r} has a size of {member.size}")
                    if member.isreg():
                        yield member
                file.seek(tar.offset)
                end = file.read(BLOCK)
                if len(end) < BLOCK or any(end):
                    raise tarfile.ReadError(f"no end-of-archive marker or member at byte {tar.offset}")
                if tar.offset == 0 and file.seek(0, os.SEEK_END) > tarfile.RECORDSIZE:  # of a tar without members
                    raise tarfile.ReadError("it begins with zeros")
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, BrokenShard):
            raise
        raise BrokenShard(f"{path}: no tar, truncated or damaged: {error}; copy or write it again") from error


def index_tar(path: Path) -> tuple[np.ndarray, bytes]:
    """The samples of a tar: (samples, COLUMNS) int64 and all keys. Raises BrokenShard.

    Members with the same key are a sample, in order of first appearance. A key whose part repeats starts another
    sample of the same key, so nothing is lost or overwritten; ``data check`` reports duplicate keys. Hidden files
    (macOS's ``._x.jpg``) and members other than an image, .txt and .json are ignored.
    """
    return retried(lambda: _index(path), str(path))


def _index(path: Path) -> tuple[np.ndarray, bytes]:
    samples: list[tuple[str, dict[str, Part]]] = []
    latest: dict[str, dict[str, Part]] = {}
    for member in scan_tar(path):
        key, extension = split_name(member.name)
        part = "image" if extension in IMAGE_EXTENSIONS else extension
        if part not in PARTS or key.rpartition("/")[2] == "":
            continue
        if key not in latest or part in latest[key]:
            latest[key] = {}
            samples.append((key, latest[key]))
        latest[key][part] = (member.offset_data, member.size)
    keys, rows, start = [key.encode() for key, _ in samples], [], 0
    for key, (_, parts) in zip(keys, samples, strict=True):
        offsets = [number for part in PARTS for number in parts.get(part, (ABSENT, 0))]
        rows.append([*offsets, start, len(key)])
        start += len(key)
    return np.array(rows, dtype=np.int64).reshape(-1, COLUMNS), b"".join(keys)


def is_header_of(header: bytes, key: str, size: int) -> bool:
    """Whether the block before a member's content is the header of one of ``size`` bytes of the sample ``key``.

    Only short ASCII names are compared: others are in a block of their own.
    """
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.TarError:
        return False
    if member.size not in (size, 0):  # 0: pax records may hold the size
        return False
    return not key.isascii() or len(key) >= 80 or split_name(member.name)[0] == key


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension, split as WebDataset does: at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
