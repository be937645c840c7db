"""One shard of an embedding cache as a file: its tensors, which ``data.cache`` lists, and the rows of captions."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.remote import RetryingFile
from llm2clip_plugin.data.samples import Caption, caption_hash, hash_hex
from llm2clip_plugin.files import ContractError, parse_header

TENSORS = ("caption_hashes", "embeddings", "key_starts", "keys", "row_starts", "scales")
CHECKS = ("image_checks", "row_checks")  # caches of older versions have image_checks, which are ignored
METADATA = ("fingerprint", "dtype", "rows_sha256", "sha256", "checks_sha256", "truncated")
META = "llm2clip"  # the metadata entry of a shard's file that holds METADATA as JSON
REDO = "rerun `llm2clip embed` with the options that made it: it embeds what is missing or damaged"
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1", "I64": "<i8"}  # safetensors' names


class ShardFile:
    """One shard's file, read by position: one open file, and transient errors are retried.

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
                f"{path} is truncated or not a shard of an embedding cache ({error}); {REDO}"
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
            raise ContractError(f"{self.path} was truncated while it was read; {REDO}")
        return np.frombuffer(data, dtype).reshape(shape)

    def key(self, index: int) -> str:
        """The key of a sample."""
        start, stop = self._read("key_starts", index, index + 2).tolist()
        return self._read("keys", start, stop).tobytes().decode()

    def row_numbers(self, index: int, captions: Sequence[Caption], key: str) -> list[int]:
        """Row of each caption of a sample; ContractError if the sample, its ``key`` or a caption was not embedded."""
        if not 0 <= index < self.samples:
            raise ContractError(f"{self.path} has no sample {index} of {self.samples}; {REDO}")
        if key and self.key(index) != key:
            raise ContractError(
                f"{self.path}: sample {index} has key {key!r} in the data, {self.key(index)!r} in the cache; {REDO}"
            )
        start, stop = self._read("row_starts", index, index + 2).tolist()
        row_of = {value: row for row, value in enumerate(self._read("caption_hashes", start, stop).tolist(), start)}
        hashes = [caption_hash(caption.text) for caption in captions]
        for value, caption in zip(hashes, captions, strict=True):
            if value not in row_of:
                known = ", ".join(map(hash_hex, row_of)) or "none"
                text = caption.text if len(caption.text) <= 60 else caption.text[:57] + "..."
                raise ContractError(
                    f"{self.path}: sample {self.key(index)!r}: caption {text!r} (hash {hash_hex(value)}) was not "
                    f"embedded; cached caption hashes: {known}; if its data was changed and the file's time kept, "
                    f"`touch` that file; {REDO}"
                )
        return [row_of[value] for value in hashes]

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
                raise ContractError(f"{self.path} is damaged: row {number} has another checksum; {REDO}")
        value_nW = stored_nW.astype(np.float32) * scale_n[:, None]
        if not np.isfinite(value_nW).all():
            raise ContractError(f"{self.path} is damaged: a row of {list(rows)} is not finite; {REDO}")
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


def row_check(row_W: np.ndarray, scale: float, number: int) -> int:
    """Checksum of a stored row with its scale and its number in the shard."""
    return zlib.crc32(row_W.data, zlib.crc32(struct.pack("<fq", scale, number)))


def has_text(caption: Caption) -> bool:
    """Whether a caption gets an embedding: blank ones don't."""
    return bool(caption.text.strip())


def caption_rows(captions: Iterable[Sequence[Caption]]) -> list[tuple[int, int]]:
    """The rows of a shard: (index of the sample, caption hash) for each distinct caption with text, in order."""
    rows: list[tuple[int, int]] = []
    for index, of_sample in enumerate(captions):
        distinct = dict.fromkeys(caption_hash(caption.text) for caption in of_sample if has_text(caption))
        rows.extend((index, value) for value in distinct)
    return rows


def rows_digest(keys: Sequence[str], rows: Sequence[tuple[int, int]]) -> str:
    """SHA-256 of the keys and caption hashes that a shard's rows belong to, in order."""
    return sha256_text(canonical_json([list(keys), [[index, hash_hex(value)] for index, value in rows]]))
