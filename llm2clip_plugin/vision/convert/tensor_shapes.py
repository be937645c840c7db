"""Sizes of a model, read from the tensors of a checkpoint."""

from __future__ import annotations

from torch import Tensor

from llm2clip_plugin.contracts import ContractError


def require(state: dict[str, Tensor], *names: str) -> None:
    """ContractError for missing tensors that every checkpoint of a layout has."""
    if missing := [name for name in names if name not in state]:
        raise ContractError(f"the checkpoint lacks {missing}, which its layout requires")


def patch_shape(state: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Width of a tower and side of its square patches, from its patch convolution (H, 3, P, P); ContractError for
    other shapes."""
    shape = tuple(state[name].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ContractError(f"{name} is {shape}, expected (width, 3, patch, patch); the tensor is transposed or cut")
    return shape[0], shape[2]


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """The number of blocks, which are numbered after ``prefix``."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
