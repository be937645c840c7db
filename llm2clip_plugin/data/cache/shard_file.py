"""One shard's file of an embedding cache (its tensors are described in data.cache): read by its header, mapped."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from llm2clip_plugin.contracts import ContractError

NUMPY_DTYPES = {"F16": np.float16, "I8": np.int8, "F32": np.float32, "I64": np.int64, "U8": np.uint8}
TENSORS = ("caption_hashes", "embeddings", "key_starts", "keys", "row_starts", "scales")
METADATA = ("fingerprint", "dtype", "rows_sha256", "sha256", "truncated")
META = "llm2clip"  # the metadata entry of a shard's file that holds METADATA as JSON
REDO = "run `llm2clip embed` again: it redoes only what is not whole"


ROW_BYTES = {"float16": 2, "int8": 1}  # of a value


def shard_bytes(samples: int, captions: int, width: int, dtype: str, *, key_bytes: int) -> int:
    """Bytes of the tensors of a cache: a row, its scale (4) and caption hash (8) a caption; the key, and where key and
    rows start (8 each), a sample."""
    return captions * (width * ROW_BYTES[dtype] + 12) + samples * (key_bytes + 16)


class ShardFile:
    """One shard's file, its header read and its tensors mapped, not loaded.

    Raises ContractError if the file is no whole cache shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise ContractError(f"{path} is cut short ({size} bytes); {REDO}")
            try:
                self._entries, self.meta = _read_header(file.read(length))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ContractError(f"{path} is no shard of an embedding cache ({error!r}); {REDO}") from error
        self._start = 8 + length
        end = max(entry["data_offsets"][1] for entry in self._entries.values())
        if self._start + end != size:
            raise ContractError(f"{path} is cut short: {size} bytes, its header asks for {self._start + end}; {REDO}")
        self.captions, self.width = self._entries["embeddings"]["shape"]
        self.samples = self._entries["row_starts"]["shape"][0] - 1
        self._maps: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor of the file, mapped read-only."""
        if name not in self._maps:
            entry = self._entries[name]
            shape, dtype = tuple(entry["shape"]), NUMPY_DTYPES[entry["dtype"]]
            if 0 in shape:  # nothing to map
                self._maps[name] = np.empty(shape, dtype)
            else:
                offset = self._start + entry["data_offsets"][0]
                self._maps[name] = np.memmap(self.path, dtype, "r", offset, shape)
        return self._maps[name]

    def key(self, index: int) -> str:
        """The key of a sample."""
        start, stop = self["key_starts"][index : index + 2]
        return bytes(self["keys"][start:stop]).decode()

    def span(self, index: int) -> tuple[int, int]:
        """First row of a sample, and the row after its last."""
        start, stop = self["row_starts"][index : index + 2]
        return int(start), int(stop)

    def embeddings(self, rows: Sequence[int] | slice) -> torch.Tensor:
        """(n, W) float32 of these rows."""
        values = self["embeddings"][rows].astype(np.float32) * self["scales"][rows][:, None]
        return torch.from_numpy(values)


def _read_header(head: bytes) -> tuple[dict[str, dict], dict[str, str]]:
    """Tensor -> its entry, and METADATA. Raises ValueError, or what a damaged header leads to."""
    entries = json.loads(head)
    meta = json.loads(entries.pop("__metadata__")[META])
    if missing := {*TENSORS, *METADATA} - {*entries, *meta}:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        size = math.prod(entry["shape"]) * np.dtype(NUMPY_DTYPES[entry["dtype"]]).itemsize
        if stop - start != size or len(entry["shape"]) != 1 + (name == "embeddings"):
            raise ValueError(f"{name} has {stop - start} bytes, its entry is {entry}")
    return entries, meta


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the tensors' bytes in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
