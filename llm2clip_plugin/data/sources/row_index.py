"""Where each row of a table is: in memory, or in an index that is built once and read on demand."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llm2clip_plugin.data.kept import KeptFolder
from llm2clip_plugin.data.retry import SteadyFile
from llm2clip_plugin.data.sources.base import Shard
from llm2clip_plugin.data.sources.index_file import DamagedIndex, IndexFile, ShardRows, Stamp, stamp_of, write_index

log = logging.getLogger(__name__)

ROWS_PER_SHARD = 16384
COLUMNS = 5  # start and size in the table's file, number for messages, start and size in the index's own text
Rows = tuple[np.ndarray, bytes | mmap.mmap]  # (rows, 3) int64: start, stop, number for messages; and all rows as JSON


class RowsInMemory:
    """The rows of a table, read completely: one block of bytes, which forked workers share."""

    def __init__(self, stem: str, spans: np.ndarray, data: bytes | mmap.mmap) -> None:
        self.spans, self.data = spans, data
        self.shards = row_shards(stem, len(spans)) if len(spans) else ()

    def row(self, shard: int, number: int) -> tuple[int, bytes]:
        """The number for messages, and the JSON."""
        start, stop, line = self.spans[self.shards[shard].start + number].tolist()
        return line, self.data[start:stop]

    def to_index(self, stamp: Stamp) -> Iterator[ShardRows]:
        """The shards of an index. Rows that are not a piece of the table's file are copied to it."""
        for shard in self.shards:
            start_R, stop_R, line_R = self.spans[shard.start : shard.start + shard.size].T
            size_R, none_R = stop_R - start_R, np.zeros(shard.size, dtype=np.int64)
            if isinstance(self.data, bytes):
                first = int(start_R[0])
                rows, text = [none_R, none_R, line_R, start_R - first, size_R], self.data[first : int(stop_R[-1])]
            else:
                rows, text = [start_R, size_R, line_R, none_R, none_R], b""
            yield ShardRows(shard.name, stamp, np.stack(rows, axis=1), text)


class KeptRows:
    """The rows of a table by its index."""

    def __init__(self, path: Path, kept: KeptFolder, index: IndexFile) -> None:
        self._path, self.kept, self._index = path, kept, index
        self._file = SteadyFile(path)
        self.stamps = index.table.stamps
        shards, start = [], 0
        for name, size in zip(index.table.names, index.table.samples, strict=True):
            shards.append(Shard(name, size, start))
            start += size
        self.shards = tuple(shards)

    def __reduce__(self) -> tuple[object, tuple[Path, KeptFolder, Path]]:
        return _reopen, (self._path, self.kept, self._index.path)

    def row(self, shard: int, number: int) -> tuple[int, bytes]:
        """The number for messages, and the JSON."""
        (start, size, line, _, _), text = self._index.row(shard, number)
        return line, text or self._file.read(size, start)


def _reopen(path: Path, kept: KeptFolder, index: Path) -> KeptRows:
    """In a loader process: nothing is compared again."""
    return KeptRows(path, kept, IndexFile(index))


def open_kept_rows(
    path: Path, name: str, spare_folder: Path, read: Callable[[], RowsInMemory]
) -> KeptRows | RowsInMemory:
    """The rows of the table at ``path`` by its index, built by one process; in memory if it can be kept nowhere."""
    kept = KeptFolder.of(path.parent, spare_folder)
    rows = _open_current(path, kept, name)
    if rows is not None:
        return rows
    with kept.lock(f"index {path}"):
        rows = _open_current(path, kept, name)
        if rows is not None:
            return rows
        stamp, in_memory = stamp_of(path), read()
        assert stamp is not None, f"{path} was removed while it was read"
        try:
            index = kept.write(name, lambda file: write_index(file, in_memory.to_index(stamp), {}, COLUMNS))
        except OSError as error:
            log.warning("cannot save an index of %s (%s); every start reads the whole file", path, error)
            return in_memory
        return KeptRows(path, kept, IndexFile(index))


def _open_current(path: Path, kept: KeptFolder, name: str) -> KeptRows | None:
    """The rows by an index of the table as it is now."""
    stamp = stamp_of(path)
    for place in kept.paths(name):
        try:
            index = IndexFile(place)
        except FileNotFoundError:
            continue
        except (OSError, DamagedIndex) as error:
            log.warning("%s; the index is built again", error)
            continue
        if index.columns == COLUMNS and all(other == stamp for other in index.table.stamps):
            return KeptRows(path, kept, index)
    return None


def row_shards(stem: str, rows: int) -> tuple[Shard, ...]:
    """One shard, or several of a long file: ranks embed them in parallel, and a killed run loses one at most."""
    if rows <= ROWS_PER_SHARD:
        return (Shard(stem, rows, 0),)
    starts = range(0, rows, ROWS_PER_SHARD)
    return tuple(Shard(f"{stem}-{i:05}", min(ROWS_PER_SHARD, rows - start), start) for i, start in enumerate(starts))
