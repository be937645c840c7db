"""OpenVision in OpenCLIP's layout: ``visual.transformer.resblocks.*`` without ``visual.ln_pre``."""

from typing import Any

from torch import Tensor

from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.checkpoint import section
from llm2clip_plugin.vision.convert import common
from llm2clip_plugin.vision.convert.layouts import open_clip
from llm2clip_plugin.vision.dual import DualEncoder

SETTINGS = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}  # of vision_cfg, in every release


def matches(state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint contains OpenCLIP's vision transformer without a norm before the blocks."""
    return common.depth(state, open_clip.BLOCKS) > 0 and not open_clip.matches(state)


def parse(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> common.ParsedCheckpoint:
    """As a CLIP; ContractError if the configuration is not OpenVision's: the tensors don't show how it pools."""
    vision = section(config, "vision_cfg")
    if different := [f"{name} {vision.get(name)!r}" for name, value in SETTINGS.items() if vision.get(name) != value]:
        raise ContractError(
            "the checkpoint has no visual.ln_pre, like OpenVision's, but its configuration has vision_cfg."
            f"{', '.join(different)}, expected {SETTINGS}; pass the model's open_clip_config.json as --config"
        )
    eps = section(vision, "norm_kwargs").get("eps", 1e-5)
    plain = {name: value for name, value in vision.items() if name not in (*SETTINGS, "norm_kwargs")}
    parsed = open_clip.parse(state, {**config, "vision_cfg": plain}, given)
    parsed.layout = LAYOUT.name
    types = {"model_type": "llm2clip_openvision", "architectures": ["OpenVisionModel"]}
    parsed.config = {**parsed.config, **types, "layer_norm_eps": eps}
    return parsed


def model_config(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's model configuration."""
    fields = open_clip.model_config(dual)
    eps = {"norm_kwargs": {"eps": dual.tower.config.layer_norm_eps}}
    return {**fields, "vision_cfg": {**fields["vision_cfg"], **SETTINGS, **eps}}


LAYOUT = common.Layout(
    name="openvision",
    matches=matches,
    parse=parse,
    family="openvision",
    visual_state=open_clip.visual_state,
    model_config=model_config,
)
