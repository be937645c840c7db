"""The samples of a tar, from its headers alone. Member names are labels: none is used as a path."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llm2clip_plugin.data.retry import retried

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
