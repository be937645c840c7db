"""safetensors files that are hashed while they are written, and read one tensor at a time without a memory map.

The library's own functions map files: on NFS a mapped file keeps its folder from being removed, and an I/O error in a
map kills the process. Its writer holds a second copy of all tensors and raises an error of its own if a disk is full.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError

BLOCK = 1 << 24  # bytes that are hashed and written at a time
MAX_HEADER = 100_000_000  # bytes, the library's own limit
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


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is looked up; no descriptor stays open in between."""

    def __init__(self, path: Path, *, prefix: str = "") -> None:
        """Read the header; ``prefix`` is dropped from the names. Raises ContractError if it doesn't fit the file."""
        self.path = path
        size = os.path.getsize(path)
        try:
            self._entries, self._start = _read_header(path, size)
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(f"{path} is damaged ({error}); resume from another checkpoint") from error
        self._entries = {name.removeprefix(prefix): entry for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, offset = self._entries[name]
        value = torch.empty(shape, dtype=dtype)
        content, done = _bytes_of(value), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + offset)
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


def _read_header(path: Path, size: int) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], int]:
    """(name -> dtype, shape, offset in the data; where the data begin); ValueError says what is wrong."""
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{size} bytes are not a whole file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{name} has shape {shape} in {stop - start} bytes from {start} on")
        entries[name], end = (dtype, shape, start), stop
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, expected {8 + length + end}")
    return entries, 8 + length


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
