"""Names and shapes between OpenCLIP checkpoints and Hugging Face's CLIP and SigLIP vision models.

``visual.transformer.resblocks.*`` is a CLIP tower, ``visual.trunk.*`` a timm model: SigLIP's, or an EVA02.
Shapes: H width of the tower, D joint width.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.checkpoints import patch_shape, require
from llm2clip_plugin.vision.convert.source_config import section

CLIP_HEAD_WIDTHS = {
    384: 64,
    512: 64,
    640: 64,
    768: 64,
    896: 64,
    1024: 64,
    1280: 80,
    1408: 88,
    1664: 104,
}  # by tower width
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}  # of the released SigLIP towers, by width

# in vision_cfg; they leave no trace in the tensors, so a tower that has them would import as another
NOT_SERVED = ("act_kwargs", "attentional_pool", "final_ln_after_pool", "norm_kwargs")

CLIP_OUTSIDE = {  # OpenCLIP -> Hugging Face
    "visual.class_embedding": "embeddings.class_embedding",
    "visual.positional_embedding": "embeddings.position_embedding.weight",
    "visual.conv1.weight": "embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "pre_layrnorm.weight",
    "visual.ln_pre.bias": "pre_layrnorm.bias",
    "visual.ln_post.weight": "post_layernorm.weight",
    "visual.ln_post.bias": "post_layernorm.bias",
}
CLIP_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SIGLIP_OUTSIDE = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj.weight": "head.attention.out_proj.weight",
    "attn_pool.proj.bias": "head.attention.out_proj.bias",
    "attn_pool.norm.weight": "head.layernorm.weight",
    "attn_pool.norm.bias": "head.layernorm.bias",
    "attn_pool.mlp.fc1.weight": "head.mlp.fc1.weight",
    "attn_pool.mlp.fc1.bias": "head.mlp.fc1.bias",
    "attn_pool.mlp.fc2.weight": "head.mlp.fc2.weight",
    "attn_pool.mlp.fc2.bias": "head.mlp.fc2.bias",
}
SIGLIP_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TIMM_EVA = {  # timm's EVA02 -> EVA-CLIP, within a block
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc2.": "mlp.w3.",
}


def is_clip(state: dict[str, Tensor]) -> bool:
    """Whether this is OpenCLIP's own vision transformer."""
    return any(name.startswith("visual.transformer.resblocks.") for name in state)


def is_siglip(state: dict[str, Tensor]) -> bool:
    """Whether this is a timm tower with SigLIP's attention pooling."""
    return any(name.startswith("visual.trunk.attn_pool.") for name in state)


def is_timm_eva(state: dict[str, Tensor]) -> bool:
    """Whether this is an EVA-CLIP tower under timm's names: SwiGLU, or a fused q, k, v with biases of its own."""
    first = "visual.trunk.blocks.0."
    return f"{first}mlp.fc1_g.weight" in state or f"{first}attn.q_bias" in state


def timm_eva_as_eva(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``visual.trunk.*`` of timm's EVA02 under the names of EVA-CLIP; other tensors as they are."""
    swiglu = "visual.trunk.blocks.0.mlp.fc1_g.weight" in state
    found = {}
    for key, value in state.items():
        name = key.replace("visual.trunk.", "visual.", 1)
        if swiglu and (match := re.fullmatch(r"(visual\.blocks\.\d+\.)(.+)", name)):
            rest = match[2]
            for theirs, ours in TIMM_EVA.items():
                if rest.startswith(theirs):
                    rest = ours + rest.removeprefix(theirs)
            name = match[1] + rest
        found[name] = value
    return found


def clip_config(state: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    """A CLIP vision config.json from the tensors; ``fields`` is OpenCLIP's model config (embed_dim, vision_cfg ...).

    Raises ValueError where ``fields`` don't describe a model: QuickGELU leaves no trace in the tensors; or where they
    describe one that is not served. ContractError where they and the tensors differ.
    """
    vision = section(fields, "vision_cfg")
    if "quick_gelu" not in fields and "width" not in vision:  # a whole model's file leaves out what is false
        raise ValueError(
            "an OpenCLIP checkpoint doesn't say its activation: OpenAI's weights need QuickGELU, LAION's GELU, and the "
            'wrong one loads fine. Say it with --config: a file with {"quick_gelu": true} or {"quick_gelu": false}, '
            "or the model's open_clip_config.json"
        )
    hidden = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    require(state, "visual.conv1.weight", "visual.positional_embedding", hidden)
    width, patch = patch_shape(state["visual.conv1.weight"], "visual.conv1.weight")
    image_size = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5) * patch
    layers = depth(state, "visual.transformer.resblocks.")
    _check_vision(vision, layers=layers, width=width, patch_size=patch, image_size=image_size)
    head_width = vision.get("head_width") or CLIP_HEAD_WIDTHS.get(width)
    if head_width is None:
        raise ValueError(f"no known CLIP tower is {width} wide; say vision_cfg.head_width in --config")
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "quick_gelu" if fields.get("quick_gelu", False) else "gelu",
        "hidden_size": width,
        "image_size": image_size,
        "intermediate_size": state[hidden].shape[0],
        "layer_norm_eps": 1e-5,
        "num_attention_heads": width // head_width,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "projection_dim": state["visual.proj"].shape[1] if "visual.proj" in state else width,
    }


def _check_vision(vision: dict[str, Any], **found: int) -> None:
    """ContractError for sizes of ``vision_cfg`` that are not those ``found`` in the tensors; ValueError for a way of
    pooling, an activation or a norm that is not served."""
    for name, size in found.items():
        told = vision.get(name)
        if told not in (None, size, [size, size]):
            hint = f"; --image-size {told} interpolates" if name == "image_size" else ""
            raise ContractError(
                f"the configuration says vision_cfg.{name} {told}, the tensors {size}: the file is not whole, or the "
                f"configuration another's{hint}"
            )
    if vision.get("pool_type") not in (None, "tok"):
        raise ValueError(f"vision_cfg.pool_type is {vision['pool_type']!r}: only 'tok', the class token, is served")
    if others := [f"{name} {vision[name]!r}" for name in NOT_SERVED if vision.get(name)]:
        raise ValueError(f"vision_cfg has {', '.join(others)}: OpenCLIP towers with these are not served")


def siglip_config(state: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    """A SigLIP vision config.json from ``visual.trunk.*``; ``fields`` may give vision_cfg.heads."""
    trunk = "visual.trunk."
    patches, hidden = f"{trunk}patch_embed.proj.weight", f"{trunk}blocks.0.mlp.fc1.weight"
    require(state, patches, f"{trunk}pos_embed", hidden)
    width, patch = patch_shape(state[patches], patches)
    heads = section(fields, "vision_cfg").get("heads") or SIGLIP_HEADS.get(width)
    if heads is None:
        raise ValueError(f"no released SigLIP tower is {width} wide; say vision_cfg.heads in --config")
    return {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": width,
        "image_size": round(state[f"{trunk}pos_embed"].shape[-2] ** 0.5) * patch,
        "intermediate_size": state[hidden].shape[0],
        "layer_norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_hidden_layers": depth(state, f"{trunk}blocks."),
        "patch_size": patch,
    }


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """The number of numbered parts under a prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def clip_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A CLIP vision model's tensors under the hub's names, and new name -> old name."""
    found: dict[str, tuple[str, Tensor]] = {}
    for key, value in state.items():
        if key in CLIP_OUTSIDE:
            found[CLIP_OUTSIDE[key]] = key, value
        elif match := re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.+)", key):
            found |= _block(f"encoder.layers.{match[1]}.", match[2], CLIP_IN_BLOCK, key, value)
    return _with_prefix(found)


def siglip_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A SigLIP vision model's tensors under the hub's names, and new name -> old name."""
    found: dict[str, tuple[str, Tensor]] = {}
    pooling: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}}
    for key, value in state.items():
        name = key.removeprefix("visual.trunk.")
        if key == name:
            continue
        if name in SIGLIP_OUTSIDE:
            found[SIGLIP_OUTSIDE[name]] = key, value
        elif name == "pos_embed":
            found["embeddings.position_embedding.weight"] = key, value.squeeze(0)
        elif match := re.fullmatch(r"attn_pool\.(q|kv)\.(weight|bias)", name):
            pooling[match[2]][match[1]] = value
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            found |= _block(f"encoder.layers.{match[1]}.", match[2], SIGLIP_IN_BLOCK, key, value)
    for kind, parts in pooling.items():
        if set(parts) == {"q", "kv"}:  # torch's MultiheadAttention keeps q, k, v as one; both old tensors are used
            old = f"visual.trunk.attn_pool.q.{kind}+visual.trunk.attn_pool.kv.{kind}"
            found[f"head.attention.in_proj_{kind}"] = old, torch.cat((parts["q"], parts["kv"]))
    return _with_prefix(found)


def _block(prefix: str, rest: str, names: dict[str, str], key: str, value: Tensor) -> dict[str, tuple[str, Tensor]]:
    """One tensor of a block under Hugging Face's name; a fused q, k, v becomes three. {} if it has no place."""
    if match := re.fullmatch(r"attn\.(?:in_proj_|qkv\.)(weight|bias)", rest):
        if value.shape[0] % 3:
            raise ContractError(f"{key} has {value.shape[0]} rows, expected q, k and v of the same height")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}_proj.{match[1]}": (key, rows) for part, rows in parts}
    module, _, kind = rest.rpartition(".")
    return {f"{prefix}{names[module]}.{kind}": (key, value)} if module in names else {}


def _with_prefix(found: dict[str, tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    state = {f"vision_model.{name}": value for name, (_, value) in found.items()}
    return state, {f"vision_model.{name}": old for name, (old, _) in found.items()}


def open_clip_state(clip_tower: dict[str, Tensor], projection: Tensor | None) -> dict[str, Tensor]:
    """The way back for CLIP: ``visual.*`` of OpenCLIP from a CLIP vision model's file and its projection (D, H)."""
    outside = {new: old for old, new in CLIP_OUTSIDE.items()}
    modules = {new: old for old, new in CLIP_IN_BLOCK.items()}
    found: dict[str, Tensor] = {}
    for key, value in clip_tower.items():
        name = key.removeprefix("vision_model.")
        if name in outside:
            found[outside[name]] = value
            continue
        _, _, index, rest = name.split(".", 3)
        prefix = f"visual.transformer.resblocks.{index}."
        if match := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
            if match[1] == "q":
                names = [f"vision_model.encoder.layers.{index}.self_attn.{part}_proj.{match[2]}" for part in "qkv"]
                found[f"{prefix}attn.in_proj_{match[2]}"] = torch.cat([clip_tower[part] for part in names])
            continue
        module, _, kind = rest.rpartition(".")
        found[f"{prefix}{modules[module]}.{kind}"] = value
    if projection is not None:
        found["visual.proj"] = projection.T.contiguous()
    return found


def open_clip_siglip_state(siglip_tower: dict[str, Tensor], projection: Tensor | None) -> dict[str, Tensor]:
    """The way back for SigLIP: OpenCLIP's ``visual.trunk.*`` (timm's names) and, for a projection (D, H), its head."""
    outside = {new: old for old, new in SIGLIP_OUTSIDE.items()}
    modules = {new: old for old, new in SIGLIP_IN_BLOCK.items()}
    state = {key.removeprefix("vision_model."): value for key, value in siglip_tower.items()}
    trunk: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in outside:
            trunk[outside[name]] = value
        elif name == "embeddings.position_embedding.weight":
            trunk["pos_embed"] = value[None]
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", name):
            query, key, rows = value.chunk(3)
            trunk |= {f"attn_pool.q.{match[1]}": query, f"attn_pool.kv.{match[1]}": torch.cat((key, rows))}
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            names = [f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[3]}" for part in "qkv"]
            trunk[f"blocks.{match[1]}.attn.qkv.{match[3]}"] = torch.cat([state[part] for part in names])
        else:
            _, _, index, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            trunk[f"blocks.{index}.{modules[module]}.{kind}"] = value
    found = {f"visual.trunk.{name}": value for name, value in trunk.items()}
    return found if projection is None else {**found, "visual.head.proj.weight": projection}
