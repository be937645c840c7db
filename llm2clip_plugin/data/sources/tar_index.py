"""The index of a tar: offset and size of each sample's image, text and JSON, in a small file with a checksum."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.sources.index_file import Stamp
from llm2clip_plugin.data.sources.tar_scan import Entry, group_samples, scan_tar

log = logging.getLogger(__name__)

FORMAT = {"kind": "llm2clip-tar-index", "format_version": 1}
COLUMNS = 8  # offset and size of image, text, JSON and key


@dataclass
class TarIndex:
    """The samples of one tar, read to memory: a table, and the keys."""

    table: np.ndarray  # (samples, 8) int64: offset and size of image, text, JSON, key
    keys: bytes  # all keys, UTF-8, one after another
    stamp: Stamp  # of the tar that was indexed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Entry:
        *columns, start, size = self.table[number].tolist()
        return make_entry(columns, self.keys[start : start + size])


def make_entry(columns: Sequence[int], key: bytes) -> Entry:
    """An entry from the first six columns of a row."""
    image, image_size, text, text_size, json_offset, json_size = columns
    return Entry(key.decode(), (image, image_size), (text, text_size), (json_offset, json_size))


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
        save_index(target, entries, stamp)
    except OSError:  # a read-only folder or file system
        target = spare
        save_index(target, entries, stamp)
    index = _load(target, stamp)
    assert index is not None, f"{target} cannot be read after writing"
    return index


def find_index(tar: Path, spare_folder: Path) -> TarIndex | None:
    """The saved index of ``tar``: with the tar's size and time, or any if the tar does not exist; None without one."""
    stamp = _stamp(tar) if tar.exists() else {}
    indexes = (_load(path, stamp) for path in _index_paths(tar, spare_folder))
    return next((index for index in indexes if index is not None), None)


def has_index(tar: Path, spare_folder: Path) -> bool:
    """Whether there is an index that names the size and time of ``tar``; its contents are not read."""
    stamp = _stamp(tar) if tar.exists() else {}
    for path in _index_paths(tar, spare_folder):
        try:
            with open(path, "rb") as file:
                head = json.loads(file.readline(4096))
        except (OSError, ValueError):
            continue
        if isinstance(head, dict) and all(head.get(name) == value for name, value in {**FORMAT, **stamp}.items()):
            return True
    return False


def _stamp(tar: Path) -> dict[str, int]:
    status = tar.stat()
    return {"tar_size": status.st_size, "tar_mtime_ns": status.st_mtime_ns}


def index_path(tar: Path) -> Path:
    """Path of the index of ``tar``, next to it."""
    return tar.with_name(f".{tar.name}.index")


def _index_paths(tar: Path, spare_folder: Path) -> tuple[Path, Path]:
    """Paths of the index of ``tar``: next to it, and in the spare folder."""
    digest = hashlib.sha256(os.path.abspath(tar).encode()).hexdigest()[:16]
    return index_path(tar), spare_folder / f".{digest}-{tar.name}.index"


def save_index(path: Path, entries: list[Entry], stamp: dict[str, int]) -> None:
    """Write one line of JSON padded to a multiple of 8 bytes, the table, and the keys."""
    names = [entry.key.encode() for entry in entries]
    sizes = np.array([len(name) for name in names], dtype=np.int64)
    table = np.zeros((len(entries), COLUMNS), dtype="<i8")
    if entries:
        table[:, :6] = [[*entry.image, *entry.text, *entry.json] for entry in entries]
        table[:, 6] = np.cumsum(sizes) - sizes
        table[:, 7] = sizes
    blob = b"".join(names)
    body = table.tobytes() + blob
    sizes_and_sum = {"samples": len(entries), "key_bytes": len(blob), "sha256": hashlib.sha256(body).hexdigest()}
    head = json.dumps({**FORMAT, **stamp, **sizes_and_sum}).encode()
    head += b" " * (-(len(head) + 1) % 8) + b"\n"
    with atomic_file(path) as temporary:
        temporary.write_bytes(head + body)


def _load(path: Path, stamp: dict[str, int]) -> TarIndex | None:
    """An index file; None if it is missing or of another tar, and, with a warning, if it is damaged."""
    try:
        line, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("cannot read %s (%s); indexing the tar again", path, error)
        return None
    try:
        head = json.loads(line)
        stale = any(head.get(name) != value for name, value in stamp.items())
        if stale and head["kind"] == FORMAT["kind"]:
            return None
        if any(head.get(name) != value for name, value in FORMAT.items()):
            raise ValueError(f"kind {head.get('kind')!r}, version {head.get('format_version')!r}")
        table_bytes = head["samples"] * COLUMNS * 8
        if len(body) != table_bytes + head["key_bytes"]:
            raise ValueError("truncated")
        if hashlib.sha256(body).hexdigest() != head["sha256"]:
            raise ValueError("another SHA-256")
        table = np.frombuffer(body[:table_bytes], dtype="<i8").reshape(-1, COLUMNS)
        return TarIndex(table, body[table_bytes:], (head["tar_size"], head["tar_mtime_ns"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); the tar is indexed again", path, error)
        return None
