"""OpenCLIP's layouts, with its own text tower or with LLM2CLIP's adapter.

CLIP: ``visual.transformer.resblocks.*``. OpenVision: the same without ``visual.ln_pre``. SigLIP: a timm model with
attention pooling, ``visual.trunk.attn_pool.*``. Other towers of timm, such as Perception Encoder: ``visual.trunk.*``.
"""

from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.convert import layouts as common
from llm2clip_plugin.vision.convert.layouts import Layout, ParsedCheckpoint, TensorNames, eva_clip
from llm2clip_plugin.vision.convert.layouts.hub import side_of, timm_fields
from llm2clip_plugin.vision.directory import section
from llm2clip_plugin.vision.dual import DualEncoder

BLOCKS = "visual.transformer.resblocks."
CLIP_NAMES = TensorNames(
    prefixes=("visual.", "vision_model."),
    outside={
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.": "embeddings.patch_embedding.",
        "ln_pre.": "pre_layrnorm.",
        "ln_post.": "post_layernorm.",
    },
    blocks=("transformer.resblocks.", "encoder.layers."),
    inside={
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "attn.out_proj.": "self_attn.out_proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    },
    fused=("attn.in_proj_", "self_attn.{}_proj."),
)
HEAD_WIDTHS = dict.fromkeys((384, 512, 640, 768, 896, 1024), 64) | {1280: 80, 1408: 88, 1664: 104}  # by tower width
# settings of vision_cfg that leave no trace in the tensors: a tower with them would be imported as another one
UNSUPPORTED = ("act_kwargs", "attentional_pool", "final_ln_after_pool", "norm_kwargs")


def matches_clip(state: dict[str, Tensor]) -> bool:
    return common.depth(state, BLOCKS) > 0 and any(name.startswith("visual.ln_pre.") for name in state)


def clip_config(state: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    """A CLIP vision config.json from the tensors; ``fields``: OpenCLIP's model config. Errors as of ``parse``."""
    vision = section(fields, "vision_cfg")
    if "quick_gelu" not in fields and "width" not in vision:  # a complete model config omits it when it is false
        raise ValueError(
            "an OpenCLIP checkpoint does not record its activation; pass its open_clip_config.json as --config, "
            'or {"quick_gelu": true} (OpenAI\'s weights), {"quick_gelu": false} (LAION\'s)'
        )
    hidden = f"{BLOCKS}0.mlp.c_fc.weight"
    common.require(state, "visual.conv1.weight", "visual.positional_embedding", hidden)
    width, patch = common.patch_shape(state, "visual.conv1.weight")
    image_size = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5) * patch
    layers = common.depth(state, BLOCKS)
    common.check_sizes(vision, layers=layers, width=width, patch_size=patch, image_size=image_size)
    if vision.get("pool_type") not in (None, "tok"):
        raise ValueError(f"vision_cfg.pool_type is {vision['pool_type']!r}; only 'tok' (class token) is supported")
    if settings := [f"{name} {vision[name]!r}" for name in UNSUPPORTED if vision.get(name)]:
        raise ValueError(f"unsupported settings in vision_cfg: {', '.join(settings)}")
    head_width = vision.get("head_width") or HEAD_WIDTHS.get(width)
    if head_width is None:
        raise ValueError(f"no known CLIP tower has width {width}; set vision_cfg.head_width with --config")
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


def parse_clip(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> ParsedCheckpoint:
    """A CLIP needs its projection if the checkpoint has a text side.

    Raises ValueError if ``config`` doesn't name the activation, or describes an unsupported model; ContractError if it
    contradicts the tensors.
    """
    parsed = CLIP_NAMES.parse(state, clip_config(state, config))
    projection = parsed.take("visual.proj")  # (H, D): OpenCLIP multiplies from the right
    parsed.projection = None if projection is None else projection.T.contiguous()
    parsed.find_text_side()
    if parsed.is_image_text:
        common.require(state, "visual.proj")
    return parsed


def clip_state(dual: DualEncoder, tower_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower and its projection."""
    return CLIP_NAMES.to_theirs(tower_file) | {"visual.proj": dual.visual_projection.weight.T}


def clip_model(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's model configuration."""
    config = dual.tower.config
    return {
        "embed_dim": dual.config.projection_dim,
        "vision_cfg": common.vision_fields(config),
        "quick_gelu": config.hidden_act == "quick_gelu",
    }


OPENVISION = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}  # of vision_cfg, in every release


def matches_openvision(state: dict[str, Tensor]) -> bool:
    return common.depth(state, BLOCKS) > 0 and not matches_clip(state)


def parse_openvision(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> ParsedCheckpoint:
    """As a CLIP; ContractError if the configuration is not OpenVision's: the tensors don't show how it pools."""
    vision = section(config, "vision_cfg")
    if different := [f"{name} {vision.get(name)!r}" for name, value in OPENVISION.items() if vision.get(name) != value]:
        raise ContractError(
            "the checkpoint has no visual.ln_pre, like OpenVision's, but its configuration has vision_cfg."
            f"{', '.join(different)}, expected {OPENVISION}; pass the model's open_clip_config.json as --config"
        )
    eps = section(vision, "norm_kwargs").get("eps", 1e-5)
    plain = {name: value for name, value in vision.items() if name not in (*OPENVISION, "norm_kwargs")}
    parsed = parse_clip(state, {**config, "vision_cfg": plain}, given)
    types = {"model_type": "llm2clip_openvision", "architectures": ["OpenVisionModel"]}
    parsed.config = {**parsed.config, **types, "layer_norm_eps": eps}
    return parsed


def openvision_model(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's model configuration."""
    fields = clip_model(dual)
    eps = {"norm_kwargs": {"eps": dual.tower.config.layer_norm_eps}}
    return {**fields, "vision_cfg": {**fields["vision_cfg"], **OPENVISION, **eps}}


TRUNK = "visual.trunk."
POSITIONS, POOLING = f"{TRUNK}pos_embed", f"{TRUNK}attn_pool."
SIGLIP_NAMES = TensorNames(  # after `join_pooling`
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
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}  # of the released SigLIP towers, by width
TIMM_NAMES = {768: "vit_base", 1024: "vit_large", 1152: "vit_so400m", 1536: "vit_giantopt"}  # by width


def matches_siglip(state: dict[str, Tensor]) -> bool:
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
    heads = section(fields, "vision_cfg").get("heads") or SIGLIP_HEADS.get(width)
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


def parse_siglip(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> ParsedCheckpoint:
    """SigLIP's own models have no projection; the pooled feature is the embedding."""
    tower_config = siglip_config(state, config)
    parsed = SIGLIP_NAMES.parse(join_pooling(state), tower_config)
    parsed.projection = parsed.take("visual.head.proj.weight")
    parsed.find_text_side()
    return parsed


def siglip_state(dual: DualEncoder, tower_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower and, if it has one, its projection."""
    state = SIGLIP_NAMES.to_theirs(tower_file)
    state[POSITIONS] = state[POSITIONS][None]
    for kind in ("weight", "bias"):  # the inverse of ``join_pooling``
        query, key, value = state.pop(f"{POOLING}in_proj_{kind}").chunk(3)
        state |= {f"{POOLING}q.{kind}": query, f"{POOLING}kv.{kind}": torch.cat((key, value))}
    if dual.config.projection == "linear":
        state["visual.head.proj.weight"] = dual.visual_projection.weight
    return state


def siglip_model(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's model configuration, which names a timm model if a released one has this width."""
    config, width = dual.tower.config, dual.tower.config.hidden_size
    vision = {
        "image_size": config.image_size,
        "timm_pool": "map",
        "timm_proj": "linear" if dual.config.projection == "linear" else "none",
    }
    if width in TIMM_NAMES:
        vision["timm_model_name"] = f"{TIMM_NAMES[width]}_patch{config.patch_size}_siglip_{config.image_size}"
    if SIGLIP_HEADS.get(width) != config.num_attention_heads:
        vision["heads"] = config.num_attention_heads  # only `llm2clip import` reads it
    return {"embed_dim": dual.config.projection_dim, "vision_cfg": vision, "quick_gelu": False}


def matches_timm(state: dict[str, Tensor]) -> bool:
    return any(name.startswith(TRUNK) for name in state) and not (matches_siglip(state) or eva_clip.matches(state))


def parse_timm(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> ParsedCheckpoint:
    """The timm model that vision_cfg names; its head, or OpenCLIP's, is the projection.

    ``vision_cfg.timm_args``, not OpenCLIP's, override arguments of the model. Raises ValueError without a name.
    """
    vision = section(config, "vision_cfg")
    if "timm_model_name" not in vision:
        raise ValueError("a timm tower needs vision_cfg.timm_model_name; pass open_clip_config.json as --config")
    pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
    arguments = {**pool, **section(vision, "timm_args")}
    fields = timm_fields(vision["timm_model_name"], side_of(vision.get("image_size")), arguments)
    inside = {key for key in state if key.startswith(TRUNK) and not key.startswith(f"{TRUNK}head.")}
    tower = {f"model.{key.removeprefix(TRUNK)}": state[key] for key in state if key in inside}
    parsed = ParsedCheckpoint(state=state, config=fields, tower=tower, used=inside)
    head = f"{TRUNK}head." if f"{TRUNK}head.weight" in state else "visual.head.proj."
    parsed.projection, bias = parsed.take(f"{head}weight"), parsed.take(f"{head}bias")
    parsed.projection_bias = bias if bias is not None and bias.any() else None
    parsed.find_text_side()
    return parsed


LAYOUT = [
    Layout("open_clip", matches_clip, parse_clip, "clip", clip_state, clip_model),
    Layout("openvision", matches_openvision, parse_openvision, "openvision", clip_state, openvision_model),
    Layout("open_clip-siglip", matches_siglip, parse_siglip, "siglip", siglip_state, siglip_model),
    Layout("open_clip-timm", matches_timm, parse_timm),
]
