"""OpenCLIP's SigLIP: a timm model with attention pooling, ``visual.trunk.attn_pool.*``."""

from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.vision.checkpoint import section
from llm2clip_plugin.vision.convert import common
from llm2clip_plugin.vision.dual import DualEncoder

TRUNK = "visual.trunk."
POSITIONS, POOLING = f"{TRUNK}pos_embed", f"{TRUNK}attn_pool."
NAMES = common.TensorNames(  # after `join_pooling`
    prefixes=(TRUNK, "vision_model."),
    outside={
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj.": "embeddings.patch_embedding.",
        "norm.": "post_layernorm.",
        "attn_pool.latent": "head.probe",
        "attn_pool.proj.": "head.attention.out_proj.",
        "attn_pool.norm.": "head.layernorm.",
    }
    | {f"attn_pool.in_proj_{kind}": f"head.attention.in_proj_{kind}" for kind in ("weight", "bias")}
    | {f"attn_pool.mlp.{layer}.": f"head.mlp.{layer}." for layer in ("fc1", "fc2")},
    blocks=("blocks.", "encoder.layers."),
    inside={"norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.proj.": "self_attn.out_proj."}
    | {name: name for name in ("mlp.fc1.", "mlp.fc2.")},
    fused=("attn.qkv.", "self_attn.{}_proj."),
)
HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}  # of the released SigLIP towers, by width
TIMM_NAMES = {768: "vit_base", 1024: "vit_large", 1152: "vit_so400m", 1536: "vit_giantopt"}  # by width


def matches(state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint contains a timm tower with SigLIP's attention pooling."""
    return any(name.startswith(POOLING) for name in state) and f"{TRUNK}norm_pre.weight" not in state  # as PE has


def join_pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query and key-value of the pooling as one tensor, as in torch's MultiheadAttention; positions as a matrix."""
    state = dict(state)
    for kind in ("weight", "bias"):
        if {f"{POOLING}q.{kind}", f"{POOLING}kv.{kind}"} <= state.keys():
            parts = state.pop(f"{POOLING}q.{kind}"), state.pop(f"{POOLING}kv.{kind}")
            state[f"{POOLING}in_proj_{kind}"] = torch.cat(parts)
    return state | {POSITIONS: state[POSITIONS].squeeze(0)}


def siglip_config(state: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    """A SigLIP vision config.json from the tensors; ``fields`` may set vision_cfg.heads."""
    patches, hidden = f"{TRUNK}patch_embed.proj.weight", f"{TRUNK}blocks.0.mlp.fc1.weight"
    common.require(state, patches, POSITIONS, hidden)
    width, patch = common.patch_shape(state, patches)
    heads = section(fields, "vision_cfg").get("heads") or HEADS.get(width)
    if heads is None:
        raise ValueError(f"no released SigLIP tower has width {width}; set vision_cfg.heads with --config")
    return {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": width,
        "image_size": round(state[POSITIONS].shape[-2] ** 0.5) * patch,
        "intermediate_size": state[hidden].shape[0],
        "layer_norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_hidden_layers": common.depth(state, f"{TRUNK}blocks."),
        "patch_size": patch,
    }


def parse(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> common.ParsedCheckpoint:
    """SigLIP's own models have no projection; the pooled feature is the embedding."""
    tower_config = siglip_config(state, config)
    state = join_pooling(state)
    tower, used = NAMES.to_ours(state)
    parsed = common.ParsedCheckpoint(
        layout="open_clip-siglip", state=state, config=tower_config, tower=tower, used=used
    )
    parsed.projection = parsed.take("visual.head.proj.weight")
    parsed.find_text_side(*common.OPEN_CLIP_TEXT, *common.NESTED_TEXT)
    return parsed


def visual_state(dual: DualEncoder, tower_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower and, if it has one, its projection."""
    state = NAMES.to_theirs(tower_file)
    state[POSITIONS] = state[POSITIONS][None]
    for kind in ("weight", "bias"):  # the inverse of ``join_pooling``
        query, key, value = state.pop(f"{POOLING}in_proj_{kind}").chunk(3)
        state |= {f"{POOLING}q.{kind}": query, f"{POOLING}kv.{kind}": torch.cat((key, value))}
    if dual.config.projection == "linear":
        state["visual.head.proj.weight"] = dual.visual_projection.weight
    return state


def model_config(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's model configuration, which names a timm model if a released one has this width."""
    config, width = dual.tower.config, dual.tower.config.hidden_size
    vision = {
        "image_size": config.image_size,
        "timm_pool": "map",
        "timm_proj": "linear" if dual.config.projection == "linear" else "none",
    }
    if width in TIMM_NAMES:
        vision["timm_model_name"] = f"{TIMM_NAMES[width]}_patch{config.patch_size}_siglip_{config.image_size}"
    if HEADS.get(width) != config.num_attention_heads:
        vision["heads"] = config.num_attention_heads  # only `llm2clip import` reads it
    return {"embed_dim": dual.config.projection_dim, "vision_cfg": vision, "quick_gelu": False}


LAYOUT = common.Layout(
    name="open_clip-siglip",
    matches=matches,
    parse=parse,
    family="siglip",
    visual_state=visual_state,
    model_config=model_config,
)
