"""The index of a tar: offset and size of each sample's image, text and JSON, in a small memory-mapped file."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.sources.tar_scan import Entry, group_samples, scan_tar

FORMAT = {"kind": "llm2clip-tar-index", "format_version": 1}
COLUMNS = 8  # offset and size of image, text, JSON and key


@dataclass
class TarIndex:
    """The samples of one tar: a memory-mapped table, and the keys."""

    table: np.ndarray  # (samples, 8) int64: offset and size of image, text, JSON, key
    keys: np.ndarray  # (bytes,) uint8: all keys, UTF-8, one after another
    tar_size: int  # bytes of the tar that was indexed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Entry:
        image, image_size, text, text_size, json_offset, json_size, key, key_size = self.table[number].tolist()
        name = self.keys[key : key + key_size].tobytes().decode()
        return Entry(name, (image, image_size), (text, text_size), (json_offset, json_size))


def open_index(tar: Path, spare_folder: Path) -> TarIndex:
    """The index of ``tar``, built and saved if ``find_index`` finds none.

    It is saved next to the tar as ``.NAME.index``, or in ``spare_folder`` if the tar's folder is read-only. Raises
    BrokenShard.
    """
    index = find_index(tar, spare_folder)
    if index is not None:
        return index
    stamp = _stamp(tar)
    entries = group_samples(scan_tar(tar))
    target, spare = _index_paths(tar, spare_folder)
    try:
        _save(target, entries, stamp)
    except OSError:  # a read-only folder or file system
        target = spare
        _save(target, entries, stamp)
    index = _load(target, stamp)
    assert index is not None, f"{target} can't be read after writing"
    return index


def find_index(tar: Path, spare_folder: Path) -> TarIndex | None:
    """The saved index of ``tar``: with the tar's size and time, or any if the tar does not exist; None without one."""
    stamp = _stamp(tar) if tar.exists() else {}
    indexes = (_load(path, stamp) for path in _index_paths(tar, spare_folder))
    return next((index for index in indexes if index is not None), None)


def _stamp(tar: Path) -> dict[str, int]:
    status = tar.stat()
    return {"tar_size": status.st_size, "tar_mtime_ns": status.st_mtime_ns}


def _index_paths(tar: Path, spare_folder: Path) -> tuple[Path, Path]:
    """Paths of the index of ``tar``: next to it, and in the spare folder."""
    digest = hashlib.sha256(os.path.abspath(tar).encode()).hexdigest()[:16]
    return tar.with_name(f".{tar.name}.index"), spare_folder / f".{digest}-{tar.name}.index"


def _save(path: Path, entries: list[Entry], stamp: dict[str, int]) -> None:
    """Write one line of JSON padded to a multiple of 8 bytes, the table, and the keys."""
    names = [entry.key.encode() for entry in entries]
    sizes = np.array([len(name) for name in names], dtype=np.int64)
    table = np.zeros((len(entries), COLUMNS), dtype="<i8")
    if entries:
        table[:, :6] = [[*entry.image, *entry.text, *entry.json] for entry in entries]
        table[:, 6] = np.cumsum(sizes) - sizes
        table[:, 7] = sizes
    blob = b"".join(names)
    head = json.dumps({**FORMAT, **stamp, "samples": len(entries), "key_bytes": len(blob)}).encode()
    head += b" " * (-(len(head) + 1) % 8) + b"\n"
    with atomic_file(path) as temporary:
        temporary.write_bytes(head + table.tobytes() + blob)


def _load(path: Path, stamp: dict[str, int]) -> TarIndex | None:
    """A memory-mapped index file; None if it is missing, truncated, of another tar or of another format."""
    try:
        with open(path, "rb") as file:
            line = file.readline(4096)
            head = json.loads(line)
    except (OSError, ValueError):
        return None
    if not isinstance(head, dict) or any(head.get(name) != value for name, value in {**FORMAT, **stamp}.items()):
        return None
    samples, key_bytes = head["samples"], head["key_bytes"]
    keys_start = len(line) + samples * COLUMNS * 8
    if path.stat().st_size != keys_start + key_bytes:
        return None
    if samples == 0:
        return TarIndex(np.zeros((0, COLUMNS), dtype="<i8"), np.zeros(0, dtype=np.uint8), head["tar_size"])
    table = np.memmap(path, dtype="<i8", mode="r", offset=len(line), shape=(samples, COLUMNS))
    keys = np.memmap(path, dtype=np.uint8, mode="r", offset=keys_start, shape=(key_bytes,))
    return TarIndex(table, keys, head["tar_size"])
