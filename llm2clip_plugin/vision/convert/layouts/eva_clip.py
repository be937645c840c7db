"""EVA-CLIP and LLM2CLIP-EVA02-*.pt: ``visual.blocks.*``."""

import json
import re
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert import layouts as common
from llm2clip_plugin.vision.convert.layouts import Layout, ParsedCheckpoint, TensorNames
from llm2clip_plugin.vision.directory import section
from llm2clip_plugin.vision.eva02 import Eva02Config, rope_tables

BLOCKS = "visual.blocks."
IN_BLOCK = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "gamma_1": "scale1",
    "gamma_2": "scale2",
    "attn.inner_attn_ln.": "attention.inner_norm.",
    "attn.proj.": "attention.out_proj.",
    "mlp.w1.": "mlp.gate_proj.",
    "mlp.w2.": "mlp.up_proj.",
    "mlp.ffn_ln.": "mlp.norm.",
    "mlp.w3.": "mlp.down_proj.",
    "attn.q_proj.": "attention.q_proj.",
    "attn.k_proj.": "attention.k_proj.",
    "attn.v_proj.": "attention.v_proj.",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
}
# the reference splits q, k and v in towers with sub-norms, and fuses them in those without
NAMES = TensorNames(
    prefix="",
    outside={
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.": "embeddings.patch_embedding.",
        "norm.": "norm.",
    },
    blocks=("blocks.", "blocks."),
    inside=IN_BLOCK,
    fused=("attn.qkv.", "attention.{}_proj."),
)
# of the released EVA-CLIP towers, by width
HEAD_WIDTHS = {
    768: 64,
    1024: 64,
    1408: 88,
    1792: 112,
}


def released_defaults(width: int, swiglu: bool, table: Tensor | None) -> dict[str, Any]:
    """``vision_cfg`` of the released tower of a width; ``table``: cosines of its rotary angles, if
    the file has them."""
    # the released towers have SwiGLU and rotary positions, or neither; some files omit the tables
    defaults = {
        "rope": swiglu,
        "intp_freq": True,
        "head_width": HEAD_WIDTHS.get(width),
        "postnorm": width == 1792,
    }
    if table is not None:
        rows, head_width = table.shape
        # in its second row the angle of a step of one column is pt_hw_seq_len / grid
        step = float(table[1, head_width // 2].float().acos())
        defaults["head_width"] = head_width
        defaults["pt_hw_seq_len"] = round(step * rows**0.5)
    return defaults


def tower_config(state: dict[str, Tensor], vision: dict[str, Any]) -> Eva02Config:
    """The configuration of a checkpoint: sizes from its tensors, the rest from ``vision``,
    EVA-CLIP's ``vision_cfg``.

    Without a width there, head width and grid of pretraining are the rotary tables', else the
    released tower's of its width; post-norm, which leaves no trace, is bigE's alone. Raises
    ValueError for an unknown width or unsupported settings, ContractError if ``vision`` contradicts
    the tensors.
    """
    first: dict[str, Tensor] = {}  # of the first block
    for name, value in state.items():
        if name.startswith(f"{BLOCKS}0."):
            first[name.removeprefix(f"{BLOCKS}0.")] = value
    swiglu = any(name.startswith(("mlp.w1.", "mlp.w2.", "mlp.w3.")) for name in first)
    hidden = f"{BLOCKS}0.mlp.{'w1' if swiglu else 'fc1'}.weight"
    common.require(state, "visual.patch_embed.proj.weight", "visual.pos_embed", hidden)
    width, patch = common.patch_shape(state, "visual.patch_embed.proj.weight")
    positions = state["visual.pos_embed"].shape[-2]
    grid = round((positions - 1) ** 0.5)  # without the class token's
    image_size = grid * patch
    if "width" not in vision:
        table = first.get("attn.rope.freqs_cos", state.get("visual.rope.freqs_cos"))
        if table is None and width not in HEAD_WIDTHS and "head_width" not in vision:
            raise ValueError(
                f"no released EVA-CLIP tower has width {width}; pass --config with "
                "vision_cfg.head_width"
            )
        vision = released_defaults(width, swiglu, table) | vision
    layers = common.depth(state, BLOCKS)
    pretrained_grid = vision.get("pt_hw_seq_len", 16)
    common.check_sizes(
        vision, width=width, layers=layers, patch_size=patch, image_size=image_size
    )
    if vision.get("global_average_pool"):
        raise ValueError(
            "global_average_pool is true; EVA-CLIP towers with average pooling are not supported"
        )
    has_fixed_rope = vision.get("rope") and not vision.get("intp_freq")
    if has_fixed_rope and grid != pretrained_grid:
        raise ValueError(
            f"intp_freq is false, but grid {grid} is not pt_hw_seq_len "
            f"{pretrained_grid}"
        )
    return Eva02Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // vision.get("head_width", 64),
        intermediate_size=state[hidden].shape[0],
        image_size=image_size,
        patch_size=patch,
        hidden_act="swiglu" if swiglu else "gelu",
        sub_norm="attn.inner_attn_ln.weight" in first,
        post_norm=bool(vision.get("postnorm")),
        rope=bool(vision.get("rope")),
        rope_pretrained_grid=pretrained_grid,
        layer_scale="gamma_1" in first,
        qkv_bias="attn.q_bias" in first or "attn.q_proj.bias" in first,
    )


def check_rope_tables(state: dict[str, Tensor], config: Eva02Config) -> list[str]:
    """Names of a checkpoint's rotary tables, which are recomputed; ContractError if they are not
    ``config``'s."""
    names = sorted(
        key
        for key in state
        if re.fullmatch(r"visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", key)
    )
    if names and not config.rope:
        raise ContractError(
            f"the checkpoint contains {names[0]}, but its configuration has no rotary positions"
        )
    for name in names:
        table = state[name]
        grid = round(state[name].shape[0] ** 0.5)
        head_width = config.hidden_size // config.num_attention_heads
        cosine, sine = rope_tables(
            grid=grid,
            pretrained_grid=config.rope_pretrained_grid,
            head_width=head_width,
        )
        expected = sine if name.endswith("sin") else cosine
        # half precision rounds values near 1 by 4e-3
        tolerance = 1e-4 if table.dtype == torch.float32 else 1e-2
        if table.shape != expected.shape or not torch.allclose(
            table.float(), expected, atol=tolerance
        ):
            heads = config.num_attention_heads
            settings = f"pt_hw_seq_len {config.rope_pretrained_grid} and {heads} heads"
            computed = f"{tuple(expected.shape)} for grid {grid}, {settings}"
            problem = f"{name} {tuple(table.shape)} differs from the table {computed}"
            raise ContractError(f"{problem}; is config.json its own?")
    return names


def parse(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """``visual.*``, ``text.*`` (adapter or EVA-CLIP's own text tower), ``logit_scale``."""
    eva = tower_config(state, section(config, "vision_cfg"))
    eva.architectures = ["Eva02VisionModel"]
    parsed = NAMES.parse(state, json.loads(eva.to_json_string(use_diff=False)))
    computed = dict.fromkeys(
        check_rope_tables(state, eva), "recomputed from the configuration and compared"
    )
    parsed.left_out.update(computed)
    parsed.projection = parsed.take("visual.head.weight")
    parsed.projection_bias = parsed.take("visual.head.bias")
    parsed.find_text_side()
    common.require(state, "visual.head.weight", "visual.head.bias")
    return parsed


def matches(state: dict[str, Tensor]) -> bool:
    """Whether it is an EVA-CLIP: Qwen2.5-VL's blocks have the same prefix, and gated MLPs."""
    is_qwen = f"{BLOCKS}0.mlp.gate_proj.weight" in state
    return common.depth(state, BLOCKS) > 0 and not is_qwen


LAYOUT = Layout("eva-clip", matches, parse)
