"""One shard of an embedding cache as a file; ``reader`` lists its tensors."""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.data.cache.dtypes import VALUE_BYTES
from llm2clip_plugin.data.cache.rerun import redo
from llm2clip_plugin.data.retry import RetryingFile
from llm2clip_plugin.outside.safetensors_header import parse_header

TENSORS = ("caption_hashes", "embeddings", "key_starts", "keys", "row_starts", "scales")
CHECKS = ("image_checks", "row_checks")
METADATA = ("fingerprint", "dtype", "rows_sha256", "sha256", "checks_sha256", "truncated")
META = "llm2clip"  # the metadata entry of a shard's file that holds METADATA as JSON
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1", "I64": "<i8"}  # safetensors' names


def shard_bytes(samples: int, captions: int, width: int, dtype: str, *, key_bytes: int) -> int:
    """Bytes of a cache's tensors.

    A caption has a row, its scale (4), its hash and its checksum (8 each); a sample has a key of ``key_bytes``, the
    starts of its key and of its rows, and the checksum of its image (8 each).
    """
    return captions * (width * VALUE_BYTES[dtype] + 20) + samples * (key_bytes + 24)


def row_check(row_W: np.ndarray, scale: float, number: int) -> int:
    """Checksum of a stored row with its scale and its number in the shard."""
    return zlib.crc32(row_W.data, zlib.crc32(struct.pack("<fq", scale, number)))


def image_check(data: bytes) -> int:
    """Checksum of an image file: its size and CRC-32, as an integer below 2^63."""
    return min(len(data), (1 << 31) - 1) << 32 | zlib.crc32(data)


class ShardFile:
    """One shard's file, read by position: one open file, and transient errors are retried (see data.retry).

    Raises ContractError if the file is truncated or not a shard of a cache, FileNotFoundError if there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RetryingFile(path)
        try:
            self.size = self._file.size()  # bytes
            header = parse_header(self.size, self._file.read)
            self._data_start, self._entries = header.data_start, header.entries
            if wrong := {*TENSORS, "row_checks", "image_checks"} ^ {*header.entries, "image_checks"}:
                raise ValueError(f"unknown or missing tensors: {', '.join(sorted(wrong))}")
            self.meta: dict[str, str] = json.loads(header.metadata[META])
            if missing := {*METADATA} - {*self.meta}:
                raise ValueError(f"its metadata is missing {', '.join(sorted(missing))}")
            self.captions, self.width = self._entries["embeddings"].shape
            self.samples = self._entries["row_starts"].shape[0] - 1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ContractError(
                f"{path} is truncated or not a shard of an embedding cache ({error}); {redo(path)}"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        """An entire tensor of the file."""
        return self._read(name, 0, self._entries[name].shape[0])

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A tensor from one index of its first axis to another."""
        entry = self._entries[name]
        dtype, shape = np.dtype(DTYPES[entry.dtype]), (stop - start, *entry.shape[1:])
        one = math.prod(shape[1:]) * dtype.itemsize
        data = self._file.read(shape[0] * one, self._data_start + entry.start + start * one)
        if len(data) != shape[0] * one:
            raise ContractError(f"{self.path} was truncated while it was read; {redo(self.path)}")
        return np.frombuffer(data, dtype).reshape(shape)

    def key(self, index: int) -> str:
        """The key of a sample."""
        start, stop = self._read("key_starts", index, index + 2).tolist()
        return self._read("keys", start, stop).tobytes().decode()

    def row_numbers(self, index: int) -> dict[int, int]:
        """Caption hash -> row number, for the captions of a sample."""
        start, stop = self._read("row_starts", index, index + 2).tolist()
        return {value: row for row, value in enumerate(self._read("caption_hashes", start, stop).tolist(), start)}

    def image_check(self, index: int) -> int:
        """Checksum of a sample's image when its captions were embedded; 0 if it was not recorded."""
        return int(self._read("image_checks", index, index + 1)[0]) if "image_checks" in self._entries else 0

    def changed_images(self, checks: Sequence[int]) -> list[int]:
        """Samples whose image has another checksum than the recorded one; none if either was not recorded."""
        if not len(checks) or "image_checks" not in self._entries:
            return []
        return np.flatnonzero(self["image_checks"] != np.asarray(checks, dtype=np.int64)).tolist()

    def embeddings(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, W) float32 of these rows, which should be near each other, as those of one sample are.

        Raises ContractError for a row that is not finite or has another checksum.
        """
        first, stop = (min(rows), max(rows) + 1) if rows else (0, 0)
        chosen = np.array(rows, dtype=np.int64) - first
        stored_nW, scale_n = self._read("embeddings", first, stop)[chosen], self._read("scales", first, stop)[chosen]
        checks = self._read("row_checks", first, stop)[chosen].tolist()
        for number, row_W, scale, check in zip(rows, stored_nW, scale_n.tolist(), checks, strict=True):
            if row_check(row_W, scale, number) != check:
                raise ContractError(f"{self.path} is damaged: row {number} has another checksum; {redo(self.path)}")
        value_nW = stored_nW.astype(np.float32) * scale_n[:, None]
        if not np.isfinite(value_nW).all():
            raise ContractError(f"{self.path} is damaged: a row of {list(rows)} is not finite; {redo(self.path)}")
        return torch.from_numpy(value_nW)

    def damage(self) -> str:
        """What is wrong with the file's contents, "" if nothing is; reads every byte."""
        for name, names in (("sha256", TENSORS), ("checks_sha256", CHECKS)):
            digest = tensors_digest({tensor: self[tensor] for tensor in names if tensor in self._entries})
            if digest != self.meta[name]:
                return f"SHA-256 {digest}, expected {self.meta[name]}"
        return ""


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the tensors' bytes in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
