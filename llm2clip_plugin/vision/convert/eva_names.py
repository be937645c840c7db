"""Names and shapes between EVA-CLIP checkpoints (``visual.*``) and ``Eva02VisionModel``.

Shapes: H width of the tower, F width of an MLP's hidden layer.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.checkpoints import patch_shape, require
from llm2clip_plugin.vision.eva02 import Eva02Config, rope_tables

PREFIX = "visual."
OUTSIDE_BLOCKS = {  # EVA-CLIP -> Eva02VisionModel
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
IN_BLOCK = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "gamma_1": "scale1",
    "gamma_2": "scale2",
    "attn.q_proj.": "attention.q_proj.",
    "attn.k_proj.": "attention.k_proj.",
    "attn.v_proj.": "attention.v_proj.",
    "attn.q_bias": "attention.q_proj.bias",  # the names of the original EVA-CLIP
    "attn.v_bias": "attention.v_proj.bias",
    "attn.inner_attn_ln.": "attention.inner_norm.",
    "attn.proj.": "attention.out_proj.",
    "mlp.w1.": "mlp.gate_proj.",
    "mlp.w2.": "mlp.up_proj.",
    "mlp.ffn_ln.": "mlp.norm.",
    "mlp.w3.": "mlp.down_proj.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
HEAD_WIDTHS = {768: 64, 1024: 64, 1408: 88, 1792: 112}  # of the released EVA-CLIP towers, by width


def is_eva(state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint holds an EVA-CLIP tower."""
    return any(name.startswith(f"{PREFIX}blocks.") for name in state)


def split_blocks(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """``visual.*`` tensors outside the blocks and by block, both without their prefix."""
    outside: dict[str, Tensor] = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if not key.startswith(PREFIX):
            continue
        if match := re.fullmatch(r"visual\.blocks\.(\d+)\.(.+)", key):
            blocks.setdefault(int(match[1]), {})[match[2]] = value
        else:
            outside[key.removeprefix(PREFIX)] = value
    return outside, blocks


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with what some writers pack taken apart: ``mlp.w12`` (gate and up in one, as xformers has it), a fused
    ``attn.qkv.bias``, and biases of the keys, which EVA-CLIP doesn't have: all zero they are left out.

    Raises ContractError for a bias of the keys that is not zero, or a packed tensor that can't be cut.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(
            r"(visual\.blocks\.\d+\.)(mlp\.w12\.|attn\.qkv\.bias|attn\.k_bias|attn\.k_proj\.bias)(.*)", key
        )
        if match is None:
            found[key] = value
            continue
        block, part, rest = match.groups()
        count = {"mlp.w12.": 2, "attn.qkv.bias": 3}.get(part, 1)
        if value.shape[0] % count:
            raise ContractError(f"{key} has {value.shape[0]} rows, expected {count} equal parts")
        pieces = value.chunk(count)
        if part == "mlp.w12.":
            found |= {f"{block}mlp.w1.{rest}": pieces[0], f"{block}mlp.w2.{rest}": pieces[1]}
            continue
        if pieces[count // 2].any():
            raise ContractError(f"{key} gives the keys a bias, which no EVA-CLIP tower has")
        if count == 3:
            found |= {f"{block}attn.q_bias": pieces[0], f"{block}attn.v_bias": pieces[2]}
    return found


def config_from_fields(vision: dict) -> Eva02Config:
    """A configuration from the ``vision_cfg`` of an EVA-CLIP config.json; ValueError for what is not served."""
    if vision.get("global_average_pool"):
        raise ValueError("global_average_pool is true: EVA-CLIP towers that pool the patches are not served")
    width, image_size, patch = vision["width"], vision["image_size"], vision["patch_size"]
    rope, grid = bool(vision.get("rope", False)), image_size // patch
    pretrained_grid = vision.get("pt_hw_seq_len", 16)
    if rope and not vision.get("intp_freq", False) and grid != pretrained_grid:
        raise ValueError(f"intp_freq is false, yet the grid is {grid} and pt_hw_seq_len {pretrained_grid}")
    return Eva02Config(
        hidden_size=width,
        num_hidden_layers=vision["layers"],
        num_attention_heads=width // vision.get("head_width", 64),
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),  # truncated, as the reference does
        image_size=image_size,
        patch_size=patch,
        hidden_act="swiglu" if vision.get("naiveswiglu", False) else "gelu",
        sub_norm=bool(vision.get("subln", False)),
        post_norm=bool(vision.get("postnorm", False)),
        rope=rope,
        rope_pretrained_grid=pretrained_grid,
        layer_scale=vision.get("ls_init_value") is not None,
        qkv_bias=bool(vision.get("qkv_bias", True)),
    )


def config_from_tensors(state: dict[str, Tensor]) -> Eva02Config:
    """The configuration of a checkpoint, read off its tensors.

    Widths and depth are in the shapes; the width of a head and the grid of pretraining are in the rotary tables where a
    checkpoint has them, else they are those of the released tower of this width. Post-norm leaves no trace: it is the
    bigE towers'. Raises ValueError where the tensors don't say enough; a config.json then has to.
    """
    outside, blocks = split_blocks(state)
    first = blocks.get(0, {})
    swiglu = any(name.startswith(("mlp.w1.", "mlp.w2.", "mlp.w3.")) for name in first)
    hidden = f"{PREFIX}blocks.0.mlp.{'w1' if swiglu else 'fc1'}.weight"
    needed = [f"{PREFIX}patch_embed.proj.weight", f"{PREFIX}pos_embed", hidden]
    require(state, *needed)
    width, patch = patch_shape(state[needed[0]], needed[0])
    grid = round((outside["pos_embed"].shape[-2] - 1) ** 0.5)
    cosines = first.get("attn.rope.freqs_cos", outside.get("rope.freqs_cos"))
    if cosines is None and width not in HEAD_WIDTHS:
        raise ValueError(f"no released EVA-CLIP tower is {width} wide; say its architecture with --config config.json")
    head_width, pretrained_grid = (HEAD_WIDTHS[width], 16) if cosines is None else read_rope_table(cosines)
    return Eva02Config(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // head_width,
        intermediate_size=state[hidden].shape[0],
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="swiglu" if swiglu else "gelu",
        sub_norm="attn.inner_attn_ln.weight" in first,
        post_norm=width == 1792,
        rope=swiglu,  # the released towers have both or neither; some files leave the tables out
        rope_pretrained_grid=pretrained_grid,
        layer_scale="gamma_1" in first,
        qkv_bias="attn.q_bias" in first or "attn.q_proj.bias" in first,
    )


def read_rope_table(cosines: Tensor) -> tuple[int, int]:
    """Width of a head and grid of pretraining that a table of cosines (grid * grid, E) was made with."""
    head_width, grid = cosines.shape[-1], round(cosines.shape[0] ** 0.5)
    for pretrained_grid in range(1, 129):
        table = rope_tables(grid=grid, pretrained_grid=pretrained_grid, head_width=head_width)[0]
        if table.shape == cosines.shape and torch.allclose(table, cosines.float(), atol=table_tolerance(cosines)):
            return head_width, pretrained_grid
    raise ContractError(f"rotary table {tuple(cosines.shape)} is that of no pretraining grid up to 128 x 128")


def table_tolerance(table: Tensor) -> float:
    """Absolute tolerance on cosines and sines: half precision rounds values near 1 by 4e-3."""
    return 1e-4 if table.dtype == torch.float32 else 1e-2


def tower_state(state: dict[str, Tensor], config: Eva02Config) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An ``Eva02VisionModel`` state from ``visual.*`` (head and rotary tables apart), and new name -> old name.

    A fused ``attn.qkv.weight`` is split. Raises ContractError for a tensor that has no place.
    """
    outside, blocks = split_blocks(state)
    rows, grid = outside["pos_embed"].shape[-2] if "pos_embed" in outside else 0, config.image_size // config.patch_size
    if rows and rows != 1 + grid**2:
        size = round((rows - 1) ** 0.5) * config.patch_size
        raise ContractError(
            f"visual.pos_embed has {rows} rows, those of image size {size}, but the configuration says "
            f"{config.image_size}; give the checkpoint's own, and --image-size {config.image_size} to interpolate"
        )
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}

    def put(name: str, value: Tensor, old: str) -> None:
        if name in found:
            raise ContractError(f"{old} and {origin[name]} both say {name}")
        found[name], origin[name] = value, old

    for key, value in outside.items():
        if key in OUTSIDE_BLOCKS:
            put(OUTSIDE_BLOCKS[key], value, PREFIX + key)
    for index, block in blocks.items():
        for key, value in block.items():
            old, new = f"{PREFIX}blocks.{index}.{key}", f"blocks.{index}."
            if key == "attn.qkv.weight":
                if value.shape != (3 * config.hidden_size, config.hidden_size):
                    raise ContractError(f"{old} is {tuple(value.shape)}, expected 3 x {config.hidden_size} rows")
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    put(f"{new}attention.{part}_proj.weight", rows, old)
                continue
            for theirs, ours in IN_BLOCK.items():
                if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
                    put(new + ours + key.removeprefix(theirs), value, old)
    return found, origin


def check_rope_tables(state: dict[str, Tensor], config: Eva02Config) -> list[str]:
    """Names of a checkpoint's rotary tables, each compared with what the configuration gives for the table's grid.

    They are rebuilt for the grid in use, so they need not be kept, but tables that differ mean another architecture,
    and some without the others a file that is not whole: ContractError names the first.
    """
    names = sorted(key for key in state if re.fullmatch(r"visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", key))
    if names and not config.rope:
        raise ContractError(f"{names[0]} is in the checkpoint, but the configuration has no rotary positions")
    pair = ("rope.freqs_cos", "rope.freqs_sin")
    inside = [f"{PREFIX}blocks.{i}.attn.{part}" for i in range(config.num_hidden_layers) for part in pair]
    for home in ([f"{PREFIX}{part}" for part in pair], inside):
        if set(names) & set(home):
            require(state, *home)
    for name in names:
        table, grid = state[name], round(state[name].shape[0] ** 0.5)
        cos, sin = rope_tables(
            grid=grid,
            pretrained_grid=config.rope_pretrained_grid,
            head_width=config.hidden_size // config.num_attention_heads,
        )
        expected = cos if name.endswith("cos") else sin
        fits = table.shape == expected.shape
        if not fits or not torch.allclose(table.float(), expected, atol=table_tolerance(table)):
            raise ContractError(
                f"{name} {tuple(table.shape)} is not what grid {grid}, pt_hw_seq_len {config.rope_pretrained_grid} and "
                f"{config.num_attention_heads} heads give {tuple(expected.shape)}; is config.json that of this file?"
            )
    return names


def eva_state(tower_state: dict[str, Tensor], config: Eva02Config) -> dict[str, Tensor]:
    """The way back: ``visual.*`` of an EVA-CLIP checkpoint, q, k, v split with sub-norms and fused without, as
    the reference has them; with the rotary tables of the tower's grid."""
    names = {new: old for old, new in OUTSIDE_BLOCKS.items()}
    parts = {new: old for old, new in IN_BLOCK.items() if "_bias" not in old}
    fused = not config.sub_norm
    found: dict[str, Tensor] = {}
    for name, value in tower_state.items():
        if name in names:
            found[PREFIX + names[name]] = value
            continue
        _, index, rest = name.split(".", 2)
        prefix = f"{PREFIX}blocks.{index}."
        if fused and (match := re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", rest)):
            if match[2] == "bias":
                found[f"{prefix}attn.{match[1]}_bias"] = value
            elif match[1] == "q":
                rows = [tower_state[f"blocks.{index}.attention.{part}_proj.weight"] for part in "qkv"]
                found[f"{prefix}attn.qkv.weight"] = torch.cat(rows)
            continue
        for new, old in parts.items():
            if rest == new or (new.endswith(".") and rest.startswith(new)):
                found[prefix + old + rest.removeprefix(new)] = value
    if config.rope:
        cos, sin = rope_tables(
            grid=config.image_size // config.patch_size,
            pretrained_grid=config.rope_pretrained_grid,
            head_width=config.hidden_size // config.num_attention_heads,
        )
        homes = ["", *(f"blocks.{index}.attn." for index in range(config.num_hidden_layers))]
        for home in homes:
            found[f"{PREFIX}{home}rope.freqs_cos"], found[f"{PREFIX}{home}rope.freqs_sin"] = cos, sin
    return found
