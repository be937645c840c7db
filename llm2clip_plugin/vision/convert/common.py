"""What importers of all layouts share: tensors by name, a parsed checkpoint, and the text adapter in it.

The adapter is found by its structure, whatever its tensors are called.

Releases nest the adapter differently (``text.text_adaptor.0.fn.0``, ``text_adapter.adaptor.0.fn.0`` ...); only its
structure is fixed: numbered residual blocks (one norm, two Linears each), then a norm, then a Linear, which are
numbered like the blocks or are modules next to them. An adapter at ``text.text_proj.text_adaptor`` was trained with
the LLM in the loop, whose embeddings the reference does not normalize.
Shapes: W width of an LLM embedding, D projection_dim.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.dual import DualEncoder

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


# A parsed checkpoint: every tensor belongs to the tower or its heads, or has a reason to be left out.

OWN_TEXT = "text tower, replaced by the LLM"
COMPUTED = "recomputed from the configuration and compared"
# prefixes of OpenCLIP's and EVA-CLIP's text towers
OPEN_CLIP_TEXT = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
)
NESTED_TEXT = tuple(f"text.{name}" for name in (*OPEN_CLIP_TEXT, "cls_emb", "proj."))


@dataclass(kw_only=True)
class ParsedCheckpoint:
    """Shapes: D projection_dim, H width of the tower."""

    layout: str  # recorded in the card as `imported_as`
    state: dict[str, Tensor]  # the checkpoint
    config: dict[str, Any]  # config.json of the vision model
    tower: dict[str, Tensor]  # under the Hub's names
    used: set[str]  # names in ``state`` that the tower or its heads use
    projection: Tensor | None = None  # (D, H)
    projection_bias: Tensor | None = None  # (D,)
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    adapter: AdapterMatch | None = None
    left_out: dict[str, str] = field(default_factory=dict)  # name in ``state`` -> reason
    preprocessor: dict[str, Any] = field(default_factory=dict)

    @property
    def is_image_text(self) -> bool:
        """Whether the checkpoint compares images with texts; a CLIP then needs its projection."""
        has_text_side = self.adapter is not None or self.logit_scale is not None
        return has_text_side or OWN_TEXT in self.left_out.values()

    def take(self, name: str) -> Tensor | None:
        """A tensor of the checkpoint, marked as used; None if it does not exist."""
        if name in self.state:
            self.used.add(name)
        return self.state.get(name)

    def find_text_side(self, *own_text: str) -> None:
        """Find logit scale and bias, and the adapter by its structure; leave out names that start with ``own_text``."""
        for name in [key for key in self.state if key.split(".")[-1] in ("logit_scale", "logit_bias")]:
            if self.state[name].numel() != 1:
                raise ContractError(f"{name} is {tuple(self.state[name].shape)}, expected one number")
            setattr(self, name.split(".")[-1], self.take(name))
        rest = [key for key in self.state if key not in self.used and key not in self.left_out]
        matches = [match for prefix in candidate_prefixes(rest) if (match := match_adapter(self.state, prefix))]
        if len(matches) > 1:
            names = [next(iter(match.names.values())) for match in matches]
            raise ContractError(f"the checkpoint contains several text adapters: {names}")
        if matches:
            self.adapter = matches[0]
            self.used |= set(self.adapter.names.values())
        self.left_out |= {key: OWN_TEXT for key in rest if key not in self.used and key.startswith(own_text)}

    def check_complete(self, *, where: str) -> None:
        """ContractError if a tensor is neither used nor left out for a reason."""
        if unused := sorted(self.state.keys() - self.used - self.left_out.keys()):
            raise ContractError(
                f"{where}: {len(unused)} of {len(self.state)} tensors do not belong to a {self.layout} model: "
                f"{unused[:10]}; a tensor was renamed, or --config must describe the architecture"
            )

    def report(self) -> list[str]:
        """What was matched and what was left out, line by line."""
        lines = [f"layout {self.layout}: {len(self.tower)} tensors of the tower"]
        if self.projection is not None:
            bias = "" if self.projection_bias is None else " with bias"
            lines.append(f"projection {tuple(self.projection.shape)}{bias}")
        if (adapter := self.adapter) is not None:
            lines.append(
                f"text adapter matched by structure: {adapter.blocks} blocks of width {adapter.llm_width}, "
                f"expansion {adapter.expansion}, then {adapter.llm_width} -> {adapter.projection_dim}"
            )
            lines += [f"  {theirs} -> text_adapter.{ours}" for ours, theirs in adapter.names.items()]
            lines += [f"  {note}" for note in adapter.notes]
        for reason in sorted(set(self.left_out.values())):
            names = sorted(name for name, why in self.left_out.items() if why == reason)
            lines.append(
                f"left out ({reason}): {len(names)} tensors ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            )
        return lines


# Tensors of a checkpoint: translate their names (theirs) to the Hugging Face model's (ours) and back, read sizes.


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


# What a layout of checkpoints consists of.


def _only_read(*_: Any) -> dict[str, Any]:
    raise NotImplementedError("this layout is only read")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of checkpoints that is recognized by its tensor names, and can be written for one family of towers.

    Without ``family`` it is only read.
    """

    name: str
    matches: Callable[[dict[str, Tensor]], bool]
    parse: Callable[[dict[str, Tensor], dict[str, Any], dict[str, Any]], ParsedCheckpoint]  # state, config, --config
    family: str = ""  # of the towers that ``visual_state`` and ``model_config`` write
    visual_state: Callable[[DualEncoder, dict[str, Tensor]], dict[str, Tensor]] = _only_read  # encoder, tower's file
    model_config: Callable[[DualEncoder], dict[str, Any]] = _only_read  # embed_dim, vision_cfg ... of OpenCLIP's file
