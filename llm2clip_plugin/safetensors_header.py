"""The header of a safetensors file, read and checked without safetensors or torch."""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
from llm2clip_plugin.errors import ContractError

# Safetensors files: the header, checked against the file's size before anything is allocated, and
# the tensors.

MAX_HEADER = 100_000_000  # bytes, the library's own limit
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Entry(NamedTuple):
    """A tensor of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the data, which begin after the header
    stop: int


class Header(NamedTuple):
    """Tensors in order of their bytes, the metadata, and where the data begin."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def load_tensors(
    path: str | os.PathLike[str], *, fix: str = "copy or export it again"
) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU. Raises as ``read_header``."""
    from safetensors.torch import load_file

    read_header(path, fix=fix)
    return load_file(path)


def read_header(
    path: str | os.PathLike[str], *, fix: str = "copy or export it again"
) -> Header:
    """Read and check a file's header. Raises ContractError naming the file and ``fix``, OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        raise ContractError(
            f"{path} is a folder, a pipe or a device, not a file; {fix}"
        )
    size = status.st_size
    with open(path, "rb") as file:
        try:
            return parse_header(
                size, lambda count, start: os.pread(file.fileno(), count, start)
            )
        except ValueError as error:
            raise ContractError(
                f"{path} is not a complete safetensors file: {error}; {fix}"
            ) from error


def parse_header(size: int, read: Callable[[int, int], bytes]) -> Header:
    """The header of a file of ``size`` bytes; ``read``: so many bytes, from an offset on. Raises
    ValueError unless every byte of the data belongs to exactly one tensor, and a tensor's shape is
    that of its bytes."""
    head = read(8, 0)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"it has {size} bytes, its header {length}")
    try:
        header = json.loads(read(length, 8))
        metadata = header.pop("__metadata__", None) or {}
        entries: dict[str, Entry] = {}
        end = 0
        in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, body in in_order:
            start, stop = body["data_offsets"]
            entry = Entry(str(body["dtype"]), tuple(body["shape"]), start, stop)
            numbers = (*entry.shape, start, stop)
            whole = all(type(number) is int and number >= 0 for number in numbers)
            fits = whole and start == end
            if fits:
                size_of_values = math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
                fits = stop - start == size_of_values
            if not fits:
                raise ValueError(
                    f"{name} has shape {entry.shape} in bytes {start} to {stop}"
                )
            entries[name] = entry
            end = stop
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged header ({error!r})") from error
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, expected {8 + length + end}")
    return Header(entries, metadata, 8 + length)
