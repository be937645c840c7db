"""A parsed checkpoint: every tensor belongs to the tower or its heads, or has a reason to be left out."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.adapter_match import AdapterMatch, candidate_prefixes, match_adapter

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
