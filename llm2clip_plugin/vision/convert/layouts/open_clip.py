"""OpenCLIP's CLIP: ``visual.transformer.resblocks.*``, with its own text tower or with LLM2CLIP's adapter."""

from typing import Any

from torch import Tensor

from llm2clip_plugin.vision.checkpoint import section, vision_fields
from llm2clip_plugin.vision.convert import common
from llm2clip_plugin.vision.dual import DualEncoder

BLOCKS = "visual.transformer.resblocks."
NAMES = common.TensorNames(
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


def matches(state: dict[str, Tensor]) -> bool:
    """Whether a checkpoint contains OpenCLIP's own vision transformer with a norm before the blocks."""
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


def parse(state: dict[str, Tensor], config: dict[str, Any], given: dict[str, Any]) -> common.ParsedCheckpoint:
    """A CLIP needs its projection if the checkpoint has a text side.

    Raises ValueError if ``config`` doesn't name the activation, or describes an unsupported model; ContractError if it
    contradicts the tensors.
    """
    tower_config = clip_config(state, config)
    tower, used = NAMES.to_ours(state)
    parsed = common.ParsedCheckpoint(layout="open_clip", state=state, config=tower_config, tower=tower, used=used)
    projection = parsed.take("visual.proj")  # (H, D): OpenCLIP multiplies from the right
    parsed.projection = None if projection is None else projection.T.contiguous()
    parsed.find_text_side(*common.OPEN_CLIP_TEXT, *common.NESTED_TEXT)
    if parsed.is_image_text:
        common.require(state, "visual.proj")
    return parsed


def visual_state(dual: DualEncoder, tower_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower and its projection."""
    return NAMES.to_theirs(tower_file) | {"visual.proj": dual.visual_projection.weight.T}


def model_config(dual: DualEncoder) -> dict[str, Any]:
    """OpenCLIP's model configuration."""
    config = dual.tower.config
    return {
        "embed_dim": dual.config.projection_dim,
        "vision_cfg": vision_fields(config),
        "quick_gelu": config.hidden_act == "quick_gelu",
    }


LAYOUT = common.Layout(
    name="open_clip", matches=matches, parse=parse, family="clip", visual_state=visual_state, model_config=model_config
)
