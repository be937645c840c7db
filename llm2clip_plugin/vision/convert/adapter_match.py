"""Find the text adapter in a checkpoint by its structure, whatever its tensors are called.

Releases nest the adapter differently (``text.text_adaptor.0.fn.0``, ``text_adapter.adaptor.0.fn.0`` ...). What is
certain is the structure: numbered parts, each a residual block (one norm, two Linears), then a norm, then a Linear,
numbered on or beside the blocks under names of their own. An adapter at ``text.text_proj.text_adaptor`` was trained
with the LLM in the loop, whose embeddings the reference hands on as they are, not normalised.
Shapes: W width of an LLM embedding, D joint width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

IN_THE_LOOP = "text.text_proj.text_adaptor."  # the reference's names when its text tower holds the LLM too


@dataclass
class AdapterMatch:
    """A found adapter: its sizes, its tensors under our names, and our name -> the checkpoint's name."""

    llm_width: int
    projection_dim: int
    blocks: int
    expansion: int
    normalise_input: bool = True
    state: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def candidate_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix that a number follows in some name: ``text.text_adaptor.`` of ``text.text_adaptor.0.ln.bias``."""
    return sorted({match[1] for name in names if (match := re.match(r"(.*?\.)\d+\.", name))})


def match_adapter(state: dict[str, Tensor], prefix: str) -> AdapterMatch | None:
    """The adapter whose parts are numbered under ``prefix``, or None if what lies there has another structure.

    Its last norm and Linear are the last two numbers, or lie beside the numbered blocks under names of their own.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        match = re.fullmatch(r"(\d+)\.(.+)", name.removeprefix(prefix))
        if match is None:
            return None
        parts.setdefault(int(match[1]), {})[match[2]] = value
    order = sorted(parts)
    if order != list(range(len(order))):
        return None
    places = [(f"{prefix}{index}.", parts[index]) for index in order]
    numbered = _assemble(dict(places[:-2]), dict(places[-2:]))
    return numbered or (_assemble(dict(places), _modules_beside(state, prefix)) if places else None)


def _modules_beside(state: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """The modules that share ``prefix``'s parent with it: ``text_adapter.norm.`` beside ``text_adapter.blocks.``."""
    parent = ".".join(prefix.split(".")[:-2])
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        place, _, kind = name.rpartition(".")
        if parent and place.rpartition(".")[0] == parent and f"{place}." != prefix:
            found.setdefault(f"{place}.", {})[kind] = value
    return found


def _assemble(blocks: dict[str, dict[str, Tensor]], ends: dict[str, dict[str, Tensor]]) -> AdapterMatch | None:
    """An adapter of residual blocks, then a norm (W) and a Linear (D, W): place -> tensors. None if they don't fit."""
    axes = {tensors["weight"].dim(): place for place, tensors in ends.items() if "weight" in tensors}
    if len(ends) != 2 or axes.keys() != {1, 2}:
        return None
    norm, last = ends[axes[1]], ends[axes[2]]
    if norm.keys() != {"weight", "bias"} or not last.keys() <= {"weight", "bias"}:
        return None
    width, joint = norm["weight"].shape[0], last["weight"].shape[0]
    matched = {place: _match_block(tensors, width) for place, tensors in blocks.items()}
    if last["weight"].shape[1] != width or any(block is None for block in matched.values()):
        return None
    expansions = {block["up.weight"][1].shape[0] // width for block in matched.values() if block is not None}
    if len(expansions) > 1:
        return None
    found = AdapterMatch(width, joint, len(blocks), expansions.pop() if expansions else 2)
    if axes[2].startswith(IN_THE_LOOP):
        found.normalise_input = False
        found.notes.append(f"{axes[2].rstrip('.')} was trained with the LLM in the loop: its input is not normalised")
    for index, (place, block) in enumerate(matched.items()):
        for ours, (theirs, value) in (block or {}).items():
            _put(found, f"blocks.{index}.{ours}", value, f"{place}{theirs}")
    for ours, place in (("norm", axes[1]), ("projection", axes[2])):
        for name, value in ends[place].items():
            _put(found, f"{ours}.{name}", value, f"{place}{name}")
    if "bias" not in last:
        found.state["projection.bias"] = torch.zeros(joint, dtype=last["weight"].dtype)
        found.notes.append(f"{axes[2].rstrip('.')} has no bias: zeros stand for it")
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
