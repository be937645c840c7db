"""One shard of an embedding cache as a file; ``reader`` lists its tensors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from llm2clip_plugin.contracts import ContractError

TENSORS = ("caption_hashes", "embeddings", "key_starts", "keys", "row_starts", "scales")
METADATA = ("fingerprint", "dtype", "rows_sha256", "sha256", "truncated")
META = "llm2clip"  # the metadata entry of a shard's file that holds METADATA as JSON
REDO = "rerun `llm2clip embed`; complete shards are skipped"
VALUE_BYTES = {"float16": 2, "int8": 1}  # of one number of a stored row
CACHE_DTYPES = tuple(VALUE_BYTES)


def shard_bytes(samples: int, captions: int, width: int, dtype: str, *, key_bytes: int) -> int:
    """Bytes of a cache's tensors.

    A caption has a row, its scale (4) and its hash (8); a sample has a key of ``key_bytes`` and the starts of its key
    and of its rows (8 each).
    """
    return captions * (width * VALUE_BYTES[dtype] + 12) + samples * (key_bytes + 16)


class ShardFile:
    """One shard's file. Its header is read at once; its tensors are mapped when the first row is used.

    Raises ContractError if the file is truncated or not a shard of a cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in TENSORS}
                self.meta: dict[str, str] = json.loads(file.metadata()[META])
            if missing := {*METADATA} - {*self.meta}:
                raise ValueError(f"its metadata is missing {', '.join(sorted(missing))}")
            self.captions, self.width = shapes["embeddings"]
            self.samples = shapes["row_starts"][0] - 1
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ContractError(
                f"{path} is truncated or not a shard of an embedding cache ({error}); {REDO}"
            ) from error

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        """Views of one memory map; no file descriptor stays open."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name).numpy() for name in TENSORS}

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor of the file, mapped."""
        return self._tensors[name]

    def key(self, index: int) -> str:
        """The key of a sample."""
        start, stop = self["key_starts"][index : index + 2].tolist()
        return self["keys"][start:stop].tobytes().decode()

    def row_numbers(self, index: int) -> dict[int, int]:
        """Caption hash -> row number, for the captions of a sample."""
        start, stop = self["row_starts"][index : index + 2].tolist()
        return {value: row for row, value in enumerate(self["caption_hashes"][start:stop].tolist(), start)}

    def embeddings(self, rows: Sequence[int] | slice) -> torch.Tensor:
        """(n, W) float32 of these rows."""
        values = self["embeddings"][rows].astype(np.float32) * self["scales"][rows][:, None]
        return torch.from_numpy(values)


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the tensors' bytes in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
