"""One shard's file of an embedding cache: which captions have a row, how tensors are read and
checked. cache.py has the format."""

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

from llm2clip_plugin.data.remote import RetryingFile
from llm2clip_plugin.data.samples import Caption, caption_hash, hash_hex
from llm2clip_plugin.data.sources import Shard, Source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.safetensors_header import parse_header

REDO = (
    "rerun `llm2clip embed` with the options that made it: it embeds what is missing or damaged, "
    "and with --overwrite what has changed"
)

# of a shard's file
TENSORS = ("caption_hashes", "embeddings", "key_starts", "keys", "row_starts", "scales")
CHECKS = ("row_checks",)
METADATA = (
    "fingerprint",
    "dtype",
    "rows_sha256",
    "sha256",
    "checks_sha256",
    "truncated",
)
META = "llm2clip"  # the metadata entry that holds METADATA as JSON
# safetensors' names
DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1", "I64": "<i8"}
SHOWN = 60  # characters of a caption in a message


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
    """The rows of a shard: (index of the sample, caption hash) for each distinct caption with text,
    in order."""
    rows: list[tuple[int, int]] = []
    for index, captions_of_sample in enumerate(captions):
        with_text = filter(has_text, captions_of_sample)
        hashes = [caption_hash(caption.text) for caption in with_text]
        rows.extend((index, distinct) for distinct in dict.fromkeys(hashes))
    return rows


def rows_digest(keys: Sequence[str], rows: Sequence[tuple[int, int]]) -> str:
    """SHA-256 of the keys and caption hashes that a shard's rows belong to, in order."""
    rows_as_text = [[index, hash_hex(value)] for index, value in rows]
    return sha256_text(canonical_json([list(keys), rows_as_text]))


class ShardFile:
    """One shard's file, read by position: one open file, and transient errors are retried. Raises
    ContractError if the file is truncated or not a shard of a cache, FileNotFoundError if there is
    none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RetryingFile(path)
        try:
            self.size = self._file.size()  # bytes
            header = parse_header(self.size, self._file.read)
            self._data_start = header.data_start
            self._entries = header.entries
            expected = {*TENSORS, *CHECKS}
            if wrong := ", ".join(sorted(expected ^ set(header.entries))):
                raise ValueError(f"unknown or missing tensors: {wrong}")
            self.meta: dict[str, str] = json.loads(header.metadata[META])
            if missing := ", ".join(sorted(set(METADATA) - set(self.meta))):
                raise ValueError(f"its metadata is missing {missing}")
            self.captions, self.width = self._entries["embeddings"].shape
            self.samples = self._entries["row_starts"].shape[0] - 1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ContractError(
                f"{path} is truncated or no shard of an embedding cache ({error}); {REDO}"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        """An entire tensor of the file."""
        return self._read(name, 0, self._entries[name].shape[0])

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """A tensor from one index of its first axis to another."""
        entry = self._entries[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        shape = (stop - start, *entry.shape[1:])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        size = shape[0] * row_bytes
        data = self._file.read(size, self._data_start + entry.start + start * row_bytes)
        if len(data) != size:
            raise ContractError(f"{self.path} was truncated while it was read; {REDO}")
        return np.frombuffer(data, dtype).reshape(shape)

    def key(self, index: int) -> str:
        """The key of a sample."""
        start, stop = self._read("key_starts", index, index + 2).tolist()
        return self._read("keys", start, stop).tobytes().decode()

    def row_numbers(
        self, index: int, captions: Sequence[Caption], key: str
    ) -> list[int]:
        """Row of each caption of a sample; ContractError if the sample, its ``key`` or a caption
        was not embedded."""
        if not 0 <= index < self.samples:
            raise ContractError(
                f"{self.path} has no sample {index} of {self.samples}; {REDO}"
            )
        if key and self.key(index) != key:
            keys = f"key {key!r} in the data, {self.key(index)!r} in the cache"
            raise ContractError(f"{self.path}: sample {index} has {keys}; {REDO}")
        start, stop = self._read("row_starts", index, index + 2).tolist()
        stored_hashes = self._read("caption_hashes", start, stop).tolist()
        row_of = {value: row for row, value in enumerate(stored_hashes, start)}
        hashes = [caption_hash(caption.text) for caption in captions]
        for value, caption in zip(hashes, captions, strict=True):
            if value not in row_of:
                raise self._not_embedded(index, caption.text, row_of)
        return [row_of[value] for value in hashes]

    def _not_embedded(
        self, index: int, text: str, cached_hashes: Iterable[int]
    ) -> ContractError:
        """The error for a caption of a sample that has no row."""
        cached = ", ".join(map(hash_hex, cached_hashes)) or "none"
        excerpt = text
        if len(text) > SHOWN:
            excerpt = text[: SHOWN - 3] + "..."
        return ContractError(
            f"{self.path}: sample {self.key(index)!r}: "
            f"caption {excerpt!r} (hash {hash_hex(caption_hash(text))}) was not embedded; "
            f"cached caption hashes: {cached}; `touch` data whose time was kept; {REDO}"
        )

    def embeddings(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, W) float32 of these rows, which should be near each other; ContractError for another
        checksum."""
        first = min(rows, default=0)
        stop = max(rows, default=-1) + 1
        chosen = np.array(rows, dtype=np.int64) - first
        stored_nW = self._read("embeddings", first, stop)[chosen]
        scale_n = self._read("scales", first, stop)[chosen]
        check_n = self._read("row_checks", first, stop)[chosen]
        scales = scale_n.tolist()
        checks = check_n.tolist()
        for number, row_W, scale, check in zip(
            rows, stored_nW, scales, checks, strict=True
        ):
            if row_check(row_W, scale, number) != check:
                raise ContractError(
                    f"{self.path} is damaged: row {number} has another checksum; {REDO}"
                )
        return torch.from_numpy(stored_nW.astype(np.float32) * scale_n[:, None])

    def verify(self) -> None:
        """Read every byte; raises ContractError if the contents have another SHA-256 than the file
        says."""
        for recorded_as, names in (("sha256", TENSORS), ("checks_sha256", CHECKS)):
            digest = tensors_digest({name: self[name] for name in names})
            expected = self.meta[recorded_as]
            if digest != expected:
                raise ContractError(
                    f"{self.path} is damaged: SHA-256 {digest}, expected {expected}; {REDO}"
                )


def shard_captions(
    source: Source, shard: Shard
) -> tuple[list[str], list[tuple[Caption, ...]]]:
    """Keys and captions of a shard's samples; an unreadable sample has a key and no captions."""
    keys: list[str] = []
    captions_of: list[tuple[Caption, ...]] = []
    for number in range(shard.start, shard.start + shard.size):
        key, captions = source.captions(number)
        keys.append(key)
        captions_of.append(captions)
    return keys, captions_of
