"""OpenCLIP with any other tower of timm, such as Perception Encoder: ``visual.trunk.*``."""

from typing import Any

from torch import Tensor

from llm2clip_plugin.vision.checkpoint import section
from llm2clip_plugin.vision.convert import common
from llm2clip_plugin.vision.convert.layouts import eva_clip, open_clip_siglip
from llm2clip_plugin.vision.convert.layouts.hub import side_of, tower_config

TRUNK = "visual.trunk."


def matches(state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint contains a timm tower that none of the other layouts knows."""
    is_known = open_clip_siglip.matches(state) or eva_clip.matches(state)
    return any(name.startswith(TRUNK) for name in state) and not is_known


def parse(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> common.ParsedCheckpoint:
    """The timm model that vision_cfg names; its head, or OpenCLIP's, is the projection.

    ``vision_cfg.timm_args``, not OpenCLIP's, override arguments of the model. Raises ValueError without a name.
    """
    vision = section(config, "vision_cfg")
    if "timm_model_name" not in vision:
        raise ValueError(
            "a timm tower needs vision_cfg.timm_model_name; pass the model's open_clip_config.json as --config"
        )
    pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
    arguments = {**pool, **section(vision, "timm_args")}
    fields = tower_config(vision["timm_model_name"], side_of(vision.get("image_size")), arguments)
    inside = {key for key in state if key.startswith(TRUNK) and not key.startswith(f"{TRUNK}head.")}
    tower = {f"model.{key.removeprefix(TRUNK)}": state[key] for key in state if key in inside}
    parsed = common.ParsedCheckpoint(layout=LAYOUT.name, state=state, config=fields, tower=tower, used=inside)
    head = f"{TRUNK}head." if f"{TRUNK}head.weight" in state else "visual.head.proj."
    parsed.projection, bias = parsed.take(f"{head}weight"), parsed.take(f"{head}bias")
    parsed.projection_bias = bias if bias is not None and bias.any() else None
    parsed.find_text_side(*common.OPEN_CLIP_TEXT, *common.NESTED_TEXT)
    return parsed


LAYOUT = common.Layout(name="open_clip-timm", matches=matches, parse=parse)
