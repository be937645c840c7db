"""safetensors files that are hashed while they are written, and read one tensor at a time without a memory map.

The library's own functions map files: on NFS a mapped file keeps its folder from being removed, and an I/O error in a
map kills the process. Its writer holds a second copy of all tensors and raises an error of its own if a disk is full.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.safetensors_header import read_header

BLOCK = 1 << 24  # bytes that are hashed and written at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        for block in (struct.pack("<Q", len(head)), head):
            digest.update(block)
            file.write(block)
        for name in ordered:
            content = _bytes_of(tensors[name].contiguous())
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
    """The tensors of a file by name, each read when it is looked up; no descriptor stays open in between."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ContractError if it doesn't fit the file."""
        self.path = path
        header = read_header(path, fix="resume from another checkpoint")
        if unknown := {entry.dtype for entry in header.entries.values()} - {*DTYPES}:
            raise ContractError(f"{path} has tensors of type {', '.join(sorted(unknown))}; known: {', '.join(DTYPES)}")
        self._start = header.data_start
        self._entries = header.entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        content, done = _bytes_of(value), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + entry.start)
            while done < len(content):
                count = file.readinto(content[done : done + BLOCK])
                if not count:
                    raise ContractError(f"{self.path} ends inside {name}; resume from another checkpoint")
                done += count
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
