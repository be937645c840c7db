"""safetensors files that are hashed while they are written, and read one tensor at a time.

The library's writer holds a second copy of all tensors, and its tensors keep the file mapped: on NFS that keeps the
folder of a checkpoint from being removed.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llm2clip_plugin.outside.safetensors_header import read_header

BLOCK = 1 << 24  # bytes that are hashed and written at a time
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of the CPU; returns the file's SHA-256. Raises OSError if the disk is full."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header, end = {}, 0
    for name in ordered:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for content in (struct.pack("<Q", len(head)), head, *(_bytes_of(tensors[name]) for name in ordered)):
            for start in range(0, len(content), BLOCK):
                digest.update(content[start : start + BLOCK])
                file.write(content[start : start + BLOCK])
    return digest.hexdigest()


class HostCopies:
    """Copies tensors to the CPU, into the memory of the copies that it made under the same names before."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of ``value``, valid until the next call with this name."""
        buffer, dtype = self._buffers.get(name), dtype or value.dtype
        if buffer is None or buffer.shape != value.shape or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(value.shape, dtype=dtype)
        return buffer.copy_(value.detach())


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is looked up; the file is not mapped in between."""

    def __init__(self, path: Path) -> None:
        """Raises ContractError if the file is not complete."""
        self.path = path
        self._entries = read_header(path, fix="resume from another checkpoint").entries

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
