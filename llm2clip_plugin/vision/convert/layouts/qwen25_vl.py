"""Qwen2.5-VL: the tower below ``visual.`` or ``model.visual.``; language model and merger are left
out."""

import json
from typing import Any

from torch import Tensor

from llm2clip_plugin.vision.convert.layouts import (
    Layout,
    ParsedCheckpoint,
    depth,
    require,
)
from llm2clip_plugin.vision.directory import section
from llm2clip_plugin.vision.qwen25 import Qwen25VisionConfig

PREFIXES = ("model.visual.", "visual.")
ACTIVATION = "silu"
MARK = "blocks.0.mlp.gate_proj.weight"  # EVA-CLIP and Qwen3-VL have none


def prefix_in(state: dict[str, Tensor]) -> str | None:
    """What the names of the tower's tensors begin with; None if it is no Qwen2.5-VL."""
    for prefix in PREFIXES:
        if prefix + MARK in state:
            return prefix
    return None


def parse_qwen25(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """Sizes are read from the tensors, the rest from ``vision_config``, or from ``config`` if it is
    the vision model's. Both frames of a patch (H, 3, 2, P, P) are one image: their weights add up.
    ValueError without heads or windows, ContractError without tensors that tell sizes."""
    prefix = prefix_in(state)
    assert prefix is not None
    patches = f"{prefix}patch_embed.proj.weight"
    require(state, patches)
    vision = section(config, "vision_config") or config
    needed = ("num_heads", "window_size", "fullatt_block_indexes")
    if missing := [name for name in needed if name not in vision]:
        raise ValueError(
            f"Qwen2.5-VL's tower needs {', '.join(missing)} in vision_config; pass the model's "
            "config.json as --config"
        )
    check_settings(vision)
    used = {
        name
        for name in state
        if name.startswith(prefix) and not name.startswith(f"{prefix}merger.")
    }
    tower = {name.removeprefix(prefix): state[name] for name in used}
    weight = tower["patch_embed.proj.weight"]
    tower["patch_embed.proj.weight"] = weight.double().sum(2).float()
    settings = Qwen25VisionConfig(
        hidden_size=len(weight),
        num_hidden_layers=depth(state, f"{prefix}blocks."),
        num_attention_heads=vision["num_heads"],
        intermediate_size=len(state[prefix + MARK]),
        image_size=vision.get("image_size", Qwen25VisionConfig().image_size),
        patch_size=weight.shape[-1],
        window_size=vision["window_size"],
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        full_attention_blocks=vision["fullatt_block_indexes"],
    )
    settings.architectures = ["Qwen25VisionModel"]
    return ParsedCheckpoint(
        state=state,
        config=json.loads(settings.to_json_string(use_diff=False)),
        tower=tower,
        used=used,
        left_out=dict.fromkeys(state.keys() - used, "language model or projector"),
    )


def check_settings(vision: dict[str, Any]) -> None:
    """ValueError for settings that the tower would read as others: block numbers that are none, and
    another activation."""
    blocks = vision["fullatt_block_indexes"]
    if isinstance(blocks, list):
        for block in blocks:
            if type(block) is not int or block < 0:
                raise ValueError(
                    f"fullatt_block_indexes has {block!r}, expected numbers of blocks"
                )
    activation = vision.get("hidden_act", ACTIVATION)
    if activation != ACTIVATION:
        raise ValueError(
            f"hidden_act is {activation!r}; Qwen2.5-VL's tower has {ACTIVATION} here"
        )


LAYOUT = Layout("qwen2.5-vl", lambda state: prefix_in(state) is not None, parse_qwen25)
