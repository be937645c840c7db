"""Tensors of a checkpoint: translate their names (theirs) to the Hugging Face model's (ours) and back, read sizes."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """A name that ends in "." stands for a module's weight and bias, any other one for a tensor."""

    prefixes: tuple[str, str]  # before every name: theirs, ours
    outside: dict[str, str]  # theirs -> ours, outside the blocks
    blocks: tuple[str, str]  # before the number of a block: theirs, ours
    inside: dict[str, str]  # theirs -> ours, within a block
    fused: tuple[str, str]  # before "weight" or "bias": theirs, q, k and v in one tensor; ours, "{}" for q, k or v

    def to_ours(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """The tower's tensors under our names, and the names of the checkpoint's tensors that were used.

        Raises ContractError if two tensors map to one name, or if a fused tensor cannot be split.
        """
        tower: dict[str, Tensor] = {}
        source: dict[str, str] = {}
        for key, value in state.items():
            for ours, part in self._ours(key, value).items():
                if ours in tower:
                    raise ContractError(f"{source[ours]} and {key} both map to {ours}")
                tower[ours], source[ours] = part, key
        return tower, set(source.values())

    def _ours(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors that one of theirs contains, under our names; {} if it is not part of the tower."""
        name = key.removeprefix(self.prefixes[0])
        if not key.startswith(self.prefixes[0]):
            return {}
        if (match := re.fullmatch(rf"{re.escape(self.blocks[0])}(\d+)\.(.+)", name)) is None:
            ours = _translate(name, self.outside)
            return {self.prefixes[1] + ours: value} if ours else {}
        block, rest = f"{self.prefixes[1]}{self.blocks[1]}{match[1]}.", match[2]
        if ours := _translate(rest, self.inside):
            return {block + ours: value}
        kind = rest.removeprefix(self.fused[0])
        if rest not in (f"{self.fused[0]}weight", f"{self.fused[0]}bias"):
            return {}
        if value.shape[0] % 3:
            raise ContractError(f"{key} has {value.shape[0]} rows, expected a multiple of 3 (query, key, value)")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {block + self.fused[1].format(part) + kind: rows for part, rows in parts}

    def to_theirs(self, tower: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors from the tower's (``tower`` must be complete)."""
        outside, inside = ({ours: theirs for theirs, ours in names.items()} for names in (self.outside, self.inside))
        fused = re.escape(self.fused[1]).replace(re.escape("{}"), "([qkv])") + "(.+)"
        state: dict[str, Tensor] = {}
        pieces: dict[str, dict[str, Tensor]] = {}
        for key, value in tower.items():
            name = key.removeprefix(self.prefixes[1])
            if (match := re.fullmatch(rf"{re.escape(self.blocks[1])}(\d+)\.(.+)", name)) is None:
                theirs = _translate(name, outside)
                assert theirs is not None, key
                state[self.prefixes[0] + theirs] = value
                continue
            block, rest = f"{self.prefixes[0]}{self.blocks[0]}{match[1]}.", match[2]
            if theirs := _translate(rest, inside):
                state[block + theirs] = value
            elif part := re.fullmatch(fused, rest):
                pieces.setdefault(f"{block}{self.fused[0]}{part[2]}", {})[part[1]] = value
        return state | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in pieces.items()}


def _translate(name: str, names: dict[str, str]) -> str | None:
    """The new name of a tensor, by itself or by its module."""
    module, _, kind = name.rpartition(".")
    if name in names:
        return names[name]
    return f"{names[f'{module}.']}{kind}" if f"{module}." in names and kind in ("weight", "bias") else None


def require(state: dict[str, Tensor], *names: str) -> None:
    """ContractError for missing tensors that every checkpoint of a layout has."""
    if missing := [name for name in names if name not in state]:
        raise ContractError(f"the checkpoint is missing {missing}, which its layout requires")


def patch_shape(state: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Width and patch size of a tower from its patch convolution (H, 3, P, P); ContractError for other shapes."""
    shape = tuple(state[name].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ContractError(
            f"{name} is {shape}, expected (width, 3, patch, patch); the tensor is transposed or truncated"
        )
    return shape[0], shape[2]


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """The number of blocks, whose numbers follow ``prefix``."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
