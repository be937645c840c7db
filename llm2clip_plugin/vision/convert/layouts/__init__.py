"""Layouts of checkpoints, each a ``LAYOUT`` of a file of this folder, and what they share: tensors
by name, a parsed checkpoint, the text adapter in it. ``hub.py`` reads what none of them recognizes.

Releases nest the adapter differently (``text.text_adaptor.0.fn.0``, ``text_adapter.adaptor.0.fn.0``
...); its parts are numbered: residual blocks (a norm, two Linears each), then a norm, then a
Linear. An adapter at ``text.text_proj.text_adaptor`` was trained with the LLM in the loop, whose
embeddings the reference does not normalize. Shapes: W width of an LLM embedding, D projection_dim.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm2clip_plugin.discovery import discover
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.directory import DualConfig, section
from llm2clip_plugin.vision.families import RESAMPLE

# the reference's names if its text tower contains the LLM too
IN_THE_LOOP = "text.text_proj.text_adaptor."
# of a block: the reference's names -> ours
PARTS = {"ln": "norm", "fn.0": "up", "fn.3": "down"}
ADAPTER = (
    r"(?P<prefix>.*\b(text_)?adaptor\.)(?P<number>\d+)\."
    r"((?P<part>ln|fn\.0|fn\.3)\.)?(?P<kind>weight|bias)"
)


class AdapterMatch(NamedTuple):
    """An adapter in a checkpoint: its sizes, its tensors under our names, and our name -> the
    checkpoint's name."""

    config: DualConfig
    state: dict[str, Tensor]
    names: dict[str, str]


def match_adapter(state: dict[str, Tensor]) -> AdapterMatch | None:
    """The text adapter in a checkpoint; ContractError for several ones, or one without its last
    Linear."""
    matches = [match for name in state if (match := re.fullmatch(ADAPTER, name))]
    if not matches:
        return None
    prefixes = sorted({match["prefix"] for match in matches})
    if len(prefixes) > 1:
        raise ContractError(
            f"the checkpoint contains several text adapters: {prefixes}"
        )
    prefix = prefixes[0]
    last = max(int(match["number"]) for match in matches)
    ends = {last - 1: "norm", last: "projection"}
    names: dict[str, str] = {}
    for match in matches:
        if match["part"]:
            module = f"blocks.{match['number']}.{PARTS[match['part']]}"
        else:
            module = ends.get(int(match["number"]))
        names[f"{module}.{match['kind']}"] = match[0]
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    weight = tensors.get("projection.weight")
    up = tensors.get("blocks.0.up.weight")
    if weight is None or weight.dim() != 2:
        raise ContractError(
            f"the checkpoint is missing {prefix}{last}.weight, the last Linear of its text adapter"
        )
    tensors.setdefault("projection.bias", torch.zeros(len(weight), dtype=weight.dtype))
    config = DualConfig(
        projection_dim=len(weight),
        llm_width=weight.shape[1],
        adapter_blocks=last - 1,
        adapter_expansion=2 if up is None else len(up) // weight.shape[1],
        normalize_input=prefix != IN_THE_LOOP,
    )
    return AdapterMatch(config, tensors, names)


# A parsed checkpoint: every tensor belongs to the tower or its heads, or has a reason to be left
# out.

OWN_TEXT = "text tower, replaced by the LLM"
# prefixes of OpenCLIP's and EVA-CLIP's text towers
TEXT = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
)
TEXT = (*TEXT, *(f"text.{name}" for name in (*TEXT, "cls_emb", "proj.")))


@dataclass(kw_only=True)
class ParsedCheckpoint:
    """Shapes: D projection_dim, H width of the tower."""

    state: dict[str, Tensor]  # the checkpoint
    config: dict[str, Any]  # config.json of the vision model
    tower: dict[str, Tensor]  # under the Hub's names
    used: set[str]  # names in ``state`` that the tower or its heads use
    projection: Tensor | None = None  # (D, H)
    projection_bias: Tensor | None = None  # (D,)
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    adapter: AdapterMatch | None = None
    # name in ``state`` -> reason
    left_out: dict[str, str] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    layout: str = ""  # recorded in the card as `imported_as`

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

    def find_text_side(self, own_text: tuple[str, ...] = TEXT) -> None:
        """Find logit scale, bias and adapter; leave out names that start with ``own_text``."""
        for name, value in self.state.items():
            field = name.split(".")[-1]
            if field not in ("logit_scale", "logit_bias"):
                continue
            if value.numel() != 1:
                raise ContractError(
                    f"{name} is {tuple(value.shape)}, expected one number"
                )
            setattr(self, field, self.take(name))
        if (adapter := match_adapter(self.state)) is not None:
            self.adapter = adapter
            self.used |= set(adapter.names.values())
        rest = self.state.keys() - self.used - self.left_out.keys()
        self.left_out |= {key: OWN_TEXT for key in rest if key.startswith(own_text)}

    def report(self) -> list[str]:
        """What was matched and what was left out, line by line."""
        lines = [f"layout {self.layout}: {len(self.tower)} tensors of the tower"]
        if self.projection is not None:
            bias = "" if self.projection_bias is None else " with bias"
            lines.append(f"projection {tuple(self.projection.shape)}{bias}")
        if self.adapter is not None:
            sizes = self.adapter.config
            tensor_name = self.adapter.names["projection.weight"]
            loop = ""
            if not sizes.normalize_input:
                loop = ", trained with the LLM in the loop: its input is not normalized"
            widths = f"{sizes.llm_width}, then {sizes.projection_dim}"
            lines.append(
                f"text adapter: {sizes.adapter_blocks} blocks of width {widths} "
                f"({tensor_name}){loop}"
            )
        for reason in sorted(set(self.left_out.values())):
            names = sorted(name for name, why in self.left_out.items() if why == reason)
            examples = names[:3]
            if len(names) > 3:
                examples.append("...")
            lines.append(
                f"left out ({reason}): {len(names)} tensors ({', '.join(examples)})"
            )
        return lines


# Tensors of a checkpoint: translate their names (theirs) to the Hugging Face model's (ours), read
# sizes.


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The names below ``visual.``; one that ends in "." stands for a module's weight and bias,
    another for a tensor."""

    prefix: str  # before all of ours
    outside: dict[str, str]  # theirs -> ours, outside the blocks
    blocks: tuple[str, str]  # before the number of a block: theirs, ours
    inside: dict[str, str]  # theirs -> ours, within a block
    # before "weight" or "bias": theirs, q, k and v in one tensor; ours, "{}" for q, k or v
    fused: tuple[str, str]

    def ours(self, theirs: str) -> list[str]:
        """Our names of a tensor of theirs: one; three for q, k and v; none if not the tower's."""
        if not theirs.startswith("visual."):
            return []
        before = self.prefix
        table = self.outside
        name = theirs.removeprefix("visual.")
        if match := re.fullmatch(rf"{re.escape(self.blocks[0])}(\d+)\.(.+)", name):
            before = f"{before}{self.blocks[1]}{match[1]}."
            table = self.inside
            name = match[2]
            if name.startswith(self.fused[0]):
                kind = name.removeprefix(self.fused[0])
                return [before + self.fused[1].format(part) + kind for part in "qkv"]
        module, _, kind = name.rpartition(".")
        ours = table.get(name, "")
        if not ours and f"{module}." in table:
            ours = table[f"{module}."] + kind
        return [before + ours] if ours else []

    def parse(
        self, state: dict[str, Tensor], config: dict[str, Any]
    ) -> ParsedCheckpoint:
        """A checkpoint's tower; ``config``: its config.json. ContractError for two tensors of one
        name."""
        parsed = ParsedCheckpoint(state=state, config=config, tower={}, used=set())
        for theirs, value in state.items():
            if not (names := self.ours(theirs)):
                continue
            if len(names) > 1 and (value.dim() == 0 or len(value) % 3):
                raise ContractError(
                    f"{theirs} is {tuple(value.shape)}, expected a multiple of 3 rows (q, k, v)"
                )
            if again := parsed.tower.keys() & names:
                raise ContractError(
                    f"{theirs} and another tensor both map to {again.pop()}"
                )
            parts = value.chunk(3) if len(names) > 1 else [value]
            parsed.tower |= zip(names, parts, strict=True)
            parsed.used.add(theirs)
        return parsed


def require(state: dict[str, Tensor], *names: str) -> None:
    """ContractError for missing tensors that every checkpoint of a layout has."""
    if missing := [name for name in names if name not in state]:
        raise ContractError(
            f"the checkpoint is missing {missing}, which its layout requires"
        )


def patch_shape(state: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Width and patch size of a tower from its patch convolution (H, 3, P, P); ContractError for
    other shapes."""
    shape = tuple(state[name].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ContractError(f"{name} is {shape}, expected (width, 3, patch, patch)")
    return shape[0], shape[2]


def check_sizes(vision: dict[str, Any], **sizes: int) -> None:
    """ContractError if ``vision_cfg`` contradicts the ``sizes`` of the tensors."""
    for name, size in sizes.items():
        if (configured := vision.get(name)) not in (None, size, [size, size]):
            hint = ""
            if name == "image_size":
                hint = f"; pass --image-size {configured} to interpolate"
            raise ContractError(
                f"vision_cfg.{name} is {configured}, but the tensors have {size}{hint}"
            )


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """The number of blocks, whose numbers follow ``prefix``."""
    numbers: set[str] = set()
    for name in state:
        if name.startswith(prefix):
            number, _, _ = name.removeprefix(prefix).partition(".")
            numbers.add(number)
    return len(numbers)


def normalization(values: dict[str, Any]) -> dict[str, Any]:
    """Mean, deviation and filter of OpenCLIP's or timm's ``values``, in Hugging Face's names."""
    fields = {f"image_{key}": values[key] for key in ("mean", "std") if key in values}
    resample = RESAMPLE.get(str(values.get("interpolation")))
    return fields if resample is None else {**fields, "resample": resample}


def lift_model_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of ``model_cfg``, where OpenCLIP's files on the Hub nest
    them, at the top."""
    return {**config, **section(config, "model_cfg")}


class Layout(NamedTuple):
    """A layout of checkpoints that is recognized by its tensor names."""

    name: str
    matches: Callable[[dict[str, Tensor]], bool]
    # of tensors and configuration
    parse: Callable[[dict[str, Tensor], dict[str, Any]], ParsedCheckpoint]


def layouts() -> dict[str, Layout]:
    """Every layout by name."""
    return discover(__name__, "LAYOUT")
