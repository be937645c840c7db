"""Find the text adapter in a checkpoint by its structure, whatever its tensors are called.

Releases nest the adapter differently (``text.text_adaptor.0.fn.0``, ``text_adapter.adaptor.0.fn.0`` ...). What is
certain is the structure: numbered parts, each a residual block (one norm, two Linears), then a norm, then a Linear.
Shapes: W width of an LLM embedding, D joint width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AdapterMatch:
    """A found adapter: its sizes, its tensors under our names, and our name -> the checkpoint's name."""

    llm_width: int
    joint_width: int
    blocks: int
    expansion: int
    state: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def candidate_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix that a number follows in some name: ``text.text_adaptor.`` of ``text.text_adaptor.0.ln.bias``."""
    return sorted({match[1] for name in names if (match := re.match(r"(.*?\.)\d+\.", name))})


def match_adapter(state: dict[str, Tensor], prefix: str) -> AdapterMatch | None:
    """The adapter under ``prefix``, or None if what lies there has another structure."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        match = re.fullmatch(r"(\d+)\.(.+)", name.removeprefix(prefix))
        if match is None:
            return None
        parts.setdefault(int(match[1]), {})[match[2]] = value
    order = sorted(parts)
    if len(order) < 2 or order != list(range(len(order))):
        return None
    last, norm = parts[order[-1]], parts[order[-2]]
    if set(norm) != {"weight", "bias"} or norm["weight"].dim() != 1:
        return None
    if not {"weight"} <= set(last) <= {"weight", "bias"} or last["weight"].dim() != 2:
        return None
    width, joint = norm["weight"].shape[0], last["weight"].shape[0]
    blocks = [_match_block(parts[index], width) for index in order[:-2]]
    if last["weight"].shape[1] != width or any(block is None for block in blocks):
        return None
    expansions = {block["up.weight"][1].shape[0] // width for block in blocks if block is not None}
    if len(expansions) > 1:
        return None
    found = AdapterMatch(width, joint, len(blocks), expansions.pop() if expansions else 2)
    for index, block in enumerate(blocks):
        for ours, (theirs, value) in (block or {}).items():
            _put(found, f"blocks.{index}.{ours}", value, f"{prefix}{index}.{theirs}")
    for ours, index, tensors in (("norm", order[-2], norm), ("projection", order[-1], last)):
        for name, value in tensors.items():
            _put(found, f"{ours}.{name}", value, f"{prefix}{index}.{name}")
    if "bias" not in last:
        found.state["projection.bias"] = torch.zeros(joint, dtype=last["weight"].dtype)
        found.notes.append(f"{prefix}{order[-1]} has no bias: zeros stand for it")
    return found


def _put(found: AdapterMatch, ours: str, value: Tensor, theirs: str) -> None:
    found.state[ours], found.names[ours] = value, theirs


def _match_block(tensors: dict[str, Tensor], width: int) -> dict[str, tuple[str, Tensor]] | None:
    """Our name -> (theirs, tensor) in a residual block: one norm (W), up (k W, W) and down (W, k W), with biases."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, {})[kind] = value
    if any(set(module) != {"weight", "bias"} for module in modules.values()):
        return None
    norms = [name for name, module in modules.items() if module["weight"].shape == (width,)]
    linears = sorted(name for name, module in modules.items() if module["weight"].dim() == 2)
    if len(modules) != 3 or len(norms) != 1 or len(linears) != 2:
        return None
    # with expansion 1 both are square, and the order of their names decides
    if modules[linears[0]]["weight"].shape[1] != width or modules[linears[1]]["weight"].shape[0] != width:
        linears.reverse()
    roles = {"norm": norms[0], "up": linears[0], "down": linears[1]}
    up, down = modules[roles["up"]]["weight"], modules[roles["down"]]["weight"]
    if up.shape[1] != width or up.shape[0] % width or down.shape != (width, up.shape[0]):
        return None
    return {
        f"{role}.{kind}": (f"{theirs}.{kind}", value)
        for role, theirs in roles.items()
        for kind, value in modules[theirs].items()
    }
