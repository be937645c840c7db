"""Find the text adapter in a checkpoint by its structure, whatever its tensors are called.

Releases nest the adapter differently (``text.text_adaptor.0.fn.0``, ``text_adapter.adaptor.0.fn.0`` ...); only its
structure is fixed: numbered residual blocks (one norm, two Linears each), then a norm, then a Linear, which are
numbered like the blocks or are modules next to them. An adapter at ``text.text_proj.text_adaptor`` was trained with
the LLM in the loop, whose embeddings the reference does not normalize.
Shapes: W width of an LLM embedding, D projection_dim.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

IN_THE_LOOP = "text.text_proj.text_adaptor."  # the reference's names if its text tower contains the LLM too


@dataclass
class AdapterMatch:
    """An adapter in a checkpoint: its sizes, its tensors under our names, and our name -> the checkpoint's name."""

    llm_width: int
    projection_dim: int
    blocks: int
    expansion: int
    normalise_input: bool = True
    state: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, ours: str, value: Tensor, theirs: str) -> None:
        """A tensor under both names."""
        self.state[ours], self.names[ours] = value, theirs


def candidate_prefixes(names: Iterable[str]) -> list[str]:
    """Every prefix that precedes a number: ``text.text_adaptor.`` in ``text.text_adaptor.0.ln.bias``."""
    return sorted({match[1] for name in names if (match := re.match(r"(.*?\.)\d+\.", name))})


def match_adapter(state: dict[str, Tensor], prefix: str) -> AdapterMatch | None:
    """The adapter whose parts are numbered after ``prefix``, or None if the tensors there have another structure."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        match = re.fullmatch(r"(\d+)\.(.+)", name.removeprefix(prefix))
        if match is None:
            return None
        parts.setdefault(int(match[1]), {})[match[2]] = value
    order = sorted(parts)
    if not order or order != list(range(len(order))):
        return None
    modules = [(f"{prefix}{index}.", parts[index]) for index in order]
    numbered = _assemble(dict(modules[:-2]), dict(modules[-2:]))
    return numbered or _assemble(dict(modules), _siblings(state, prefix))


def _by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module, which is named with a final "."."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        module, dot, kind = name.rpartition(".")
        modules.setdefault(module + dot, {})[kind] = value
    return modules


def _siblings(state: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """The modules next to the one at ``prefix``: ``text_adapter.norm.`` for ``text_adapter.blocks.``."""
    parent = ".".join(prefix.split(".")[:-2])
    is_sibling = re.compile(rf"{re.escape(parent)}\.[^.]+\.").fullmatch
    modules = _by_module(state) if parent else {}
    return {module: tensors for module, tensors in modules.items() if is_sibling(module) and module != prefix}


def _assemble(blocks: dict[str, dict[str, Tensor]], ends: dict[str, dict[str, Tensor]]) -> AdapterMatch | None:
    """An adapter of residual blocks, then a norm (W) and a Linear (D, W), all as module name -> tensors; None if the
    shapes don't fit."""
    axes = {tensors["weight"].dim(): module for module, tensors in ends.items() if "weight" in tensors}
    if len(ends) != 2 or axes.keys() != {1, 2}:
        return None
    norm, last = ends[axes[1]], ends[axes[2]]
    if norm.keys() != {"weight", "bias"} or not last.keys() <= {"weight", "bias"}:
        return None
    width, projection_dim = norm["weight"].shape[0], last["weight"].shape[0]
    matched = {module: _match_block(tensors, width) for module, tensors in blocks.items()}
    if last["weight"].shape[1] != width or any(block is None for block in matched.values()):
        return None
    expansions = {block["up.weight"][1].shape[0] // width for block in matched.values() if block is not None}
    if len(expansions) > 1:
        return None
    adapter = AdapterMatch(width, projection_dim, len(blocks), expansions.pop() if expansions else 2)
    name = axes[2].rstrip(".")
    if axes[2].startswith(IN_THE_LOOP):
        adapter.normalise_input = False
        adapter.notes.append(f"{name} was trained with the LLM in the loop: its input is not normalized")
    for index, (module, block) in enumerate(matched.items()):
        for ours, (theirs, value) in (block or {}).items():
            adapter.add(f"blocks.{index}.{ours}", value, f"{module}{theirs}")
    for ours, module in (("norm", axes[1]), ("projection", axes[2])):
        for kind, value in ends[module].items():
            adapter.add(f"{ours}.{kind}", value, f"{module}{kind}")
    if "bias" not in last:
        adapter.state["projection.bias"] = torch.zeros(projection_dim, dtype=last["weight"].dtype)
        adapter.notes.append(f"{name} has no bias: filled with zeros")
    return adapter


def _match_block(tensors: dict[str, Tensor], width: int) -> dict[str, tuple[str, Tensor]] | None:
    """Our name -> (theirs, tensor) in a residual block: one norm (W), up (k W, W) and down (W, k W), with biases."""
    modules = _by_module(tensors)
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
        f"{role}.{kind}": (f"{theirs}{kind}", value)
        for role, theirs in roles.items()
        for kind, value in modules[theirs].items()
    }
