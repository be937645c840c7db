"""Tensors of checkpoints, read one by one when they are needed, and written in shards.

A model of any size passes through the memory of one shard.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.safetensors_header import DTYPE_BYTES, read_header
from llm2clip_plugin.outside.values import errors_about
from llm2clip_plugin.vision.convert.checkpoint_files import read_tensors, weight_files

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"
FIX = "copy the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is read from its file when ``read`` is called."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    where: str  # the file, for messages

    @classmethod
    def of(cls, tensor: Tensor, where: object) -> "LazyTensor":
        """A tensor that is in memory already."""
        return cls(shape=tuple(tensor.shape), read=lambda: tensor, where=str(where))


LazyTensors = dict[str, LazyTensor]


def open_tensors(directory: Path, files: ExitStack) -> LazyTensors:
    """Every tensor of a folder's checkpoint: .safetensors or .bin, one file or the shards of an index.

    ``files`` keeps the files open. Raises FileNotFoundError for a folder without weights or a missing shard,
    ContractError for a file that is not complete.
    """
    tensors: LazyTensors = {}
    for path in weight_files(directory):
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {directory}, which its index lists; {FIX}")
        tensors |= open_file(path, files)
    return tensors


def open_file(path: Path, files: ExitStack) -> LazyTensors:
    """The tensors of one file. Raises ContractError if it is not complete."""
    if path.suffix != ".safetensors":
        tensors = read_tensors(path)
        _refuse_quantized({name: str(tensor.dtype) for name, tensor in tensors.items() if tensor.itemsize == 1}, path)
        return {name: LazyTensor.of(tensor, path) for name, tensor in tensors.items()}
    from safetensors import safe_open

    header = read_header(path, fix=FIX)
    _refuse_quantized({n: e.dtype for n, e in header.entries.items() if DTYPE_BYTES[e.dtype] == 1}, path)
    with errors_about(path, fix=FIX):
        handle: Any = files.enter_context(safe_open(path, framework="pt"))
    return {
        name: LazyTensor(shape=entry.shape, read=lambda name=name: handle.get_tensor(name), where=str(path))
        for name, entry in header.entries.items()
    }


def _refuse_quantized(dtypes: dict[str, str], path: Path) -> None:
    """``dtypes``: of the tensors that have one byte a number."""
    for name, dtype in dtypes.items():
        raise ContractError(
            f"{path}: {name} has dtype {dtype}, expected float weights; quantized checkpoints are not read, use the "
            "one that this was made from"
        )


def write_shards(tensors: LazyTensors, directory: Path, dtype: torch.dtype | None) -> int:
    """Write ``tensors`` as safetensors shards with their index, and compare each with what was written; their bytes.

    ``dtype`` None keeps each tensor's own.
    Raises ContractError for a value that ``dtype`` cannot hold, or a shard that reads back differently.
    """
    shards = list(_shards(tensors, dtype))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {name: _converted(name, tensors[name], dtype) for name in names}
        _write(state, directory / file)
        weight_map |= dict.fromkeys(state, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if len(shards) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total


def _shards(tensors: LazyTensors, dtype: torch.dtype | None) -> Iterator[list[str]]:
    """Names in order, as many as fit into a shard."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        more = torch.Size(tensor.shape).numel() * (dtype or torch.float32).itemsize
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _converted(name: str, tensor: LazyTensor, dtype: torch.dtype | None) -> Tensor:
    with errors_about(tensor.where, fix=FIX):
        value = tensor.read()
    # contiguous and of its own memory: safetensors refuses tensors that share it
    out = value.to(dtype or value.dtype, copy=True).contiguous()
    if not torch.isfinite(out).all():
        large = (
            "has values that fp16 cannot hold; pass --dtype bf16" if torch.isfinite(value).all() else f"is nan; {FIX}"
        )
        raise ContractError(f"{tensor.where}: {name} {large}")
    return out


def _write(state: dict[str, Tensor], path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as written:
        for name, tensor in state.items():
            if not torch.equal(written.get_tensor(name), tensor):  # pyright: ignore[reportAttributeAccessIssue]
                raise ContractError(
                    f"{path}: {name} differs after reloading; check the disk and rerun the same command"
                )


def refuse_rest(names: Iterable[str], where: object) -> None:
    """Raise ContractError for tensors that nothing knows, by name."""
    if rest := sorted(names):
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        raise ContractError(f"{where}: unknown tensors {', '.join(rest[:5])}{more}; this is not a LLaVA 1.5 checkpoint")
