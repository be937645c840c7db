"""OpenCLIP's layouts, with its own text tower or with LLM2CLIP's adapter.

CLIP: ``visual.transformer.resblocks.*``. OpenVision: the same without ``visual.ln_pre``. Towers of
timm, such as Perception Encoder: ``visual.trunk.*``.
"""

from typing import Any

from torch import Tensor

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert import layouts as common
from llm2clip_plugin.vision.convert.layouts import Layout, ParsedCheckpoint, TensorNames
from llm2clip_plugin.vision.convert.layouts.hub import side_of, timm_fields
from llm2clip_plugin.vision.directory import section

BLOCKS = "visual.transformer.resblocks."
CLIP_NAMES = TensorNames(
    prefix="vision_model.",
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
# by tower width
HEAD_WIDTHS = dict.fromkeys((384, 512, 640, 768, 896, 1024), 64) | {
    1280: 80,
    1408: 88,
    1664: 104,
}
# settings of vision_cfg that leave no trace in the tensors: a tower with them would be imported as
# another one
UNSUPPORTED = ("act_kwargs", "attentional_pool", "final_ln_after_pool", "norm_kwargs")


def has(state: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def clip_config(state: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    """A CLIP vision config.json from the tensors; ``fields``: OpenCLIP's model config. Errors as of
    ``parse``."""
    vision = section(fields, "vision_cfg")
    # a complete model config omits it when it is false
    if "quick_gelu" not in fields and "width" not in vision:
        openai = '{"quick_gelu": true} (OpenAI\'s weights)'
        laion = '{"quick_gelu": false} (LAION\'s)'
        advice = f"its open_clip_config.json, {openai} or {laion}"
        raise ValueError(
            f"an OpenCLIP checkpoint does not record its activation; pass as --config {advice}"
        )
    hidden = f"{BLOCKS}0.mlp.c_fc.weight"
    common.require(state, "visual.conv1.weight", "visual.positional_embedding", hidden)
    width, patch = common.patch_shape(state, "visual.conv1.weight")
    positions = state["visual.positional_embedding"].shape[0]
    grid = round((positions - 1) ** 0.5)  # without the class token's
    image_size = grid * patch
    layers = common.depth(state, BLOCKS)
    common.check_sizes(
        vision, layers=layers, width=width, patch_size=patch, image_size=image_size
    )
    if vision.get("pool_type") not in (None, "tok"):
        raise ValueError(
            f"vision_cfg.pool_type is {vision['pool_type']!r}; only 'tok' (class token) is "
            "supported"
        )
    settings = [f"{name} {vision[name]!r}" for name in UNSUPPORTED if vision.get(name)]
    if settings:
        raise ValueError(f"unsupported settings in vision_cfg: {', '.join(settings)}")
    head_width = vision.get("head_width") or HEAD_WIDTHS.get(width)
    if head_width is None:
        raise ValueError(
            f"no known CLIP tower has width {width}; set vision_cfg.head_width with --config"
        )
    projection_dim = width
    if "visual.proj" in state:
        projection_dim = state["visual.proj"].shape[1]
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
        "projection_dim": projection_dim,
    }


def parse_clip(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """A CLIP needs its projection if the checkpoint has a text side. Raises ValueError if
    ``config`` doesn't name the activation, or describes an unsupported model; ContractError if it
    contradicts the tensors."""
    parsed = CLIP_NAMES.parse(state, clip_config(state, config))
    # (H, D): OpenCLIP multiplies from the right
    projection = parsed.take("visual.proj")
    parsed.projection = None if projection is None else projection.T.contiguous()
    parsed.find_text_side()
    if parsed.is_image_text:
        common.require(state, "visual.proj")
    return parsed


# of vision_cfg, in every release
OPENVISION = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}


def parse_openvision(
    state: dict[str, Tensor], config: dict[str, Any]
) -> ParsedCheckpoint:
    """As a CLIP; ContractError if the configuration is not OpenVision's: the tensors don't show how
    it pools."""
    vision = section(config, "vision_cfg")
    different: list[str] = []
    for name, value in OPENVISION.items():
        if vision.get(name) != value:
            different.append(f"{name} {vision.get(name)!r}")
    if different:
        fields = ", ".join(different)
        problem = f"no visual.ln_pre, like OpenVision's, but vision_cfg.{fields}"
        raise ContractError(
            f"the checkpoint has {problem}, expected {OPENVISION}; "
            "pass the model's open_clip_config.json as --config"
        )
    eps = section(vision, "norm_kwargs").get("eps", 1e-5)
    plain = dict(vision)  # without what is OpenVision's own
    for name in (*OPENVISION, "norm_kwargs"):
        plain.pop(name, None)
    parsed = parse_clip(state, {**config, "vision_cfg": plain})
    types = {"model_type": "llm2clip_openvision", "architectures": ["OpenVisionModel"]}
    parsed.config = {**parsed.config, **types, "layer_norm_eps": eps}
    return parsed


TRUNK = "visual.trunk."


def parse_timm(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """The timm model that vision_cfg names; its head, or OpenCLIP's, is the projection.
    ``vision_cfg.timm_args``, not OpenCLIP's, override arguments of the model. Raises ValueError
    without a name."""
    vision = section(config, "vision_cfg")
    if "timm_model_name" not in vision:
        raise ValueError(
            "a timm tower needs vision_cfg.timm_model_name; pass open_clip_config.json as --config"
        )
    pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
    arguments = {**pool, **section(vision, "timm_args")}
    fields = timm_fields(
        vision["timm_model_name"], side_of(vision.get("image_size")), arguments
    )
    inside: set[str] = set()
    tower: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(TRUNK) and not key.startswith(f"{TRUNK}head."):
            inside.add(key)
            tower[f"model.{key.removeprefix(TRUNK)}"] = value
    parsed = ParsedCheckpoint(state=state, config=fields, tower=tower, used=inside)
    head = f"{TRUNK}head." if f"{TRUNK}head.weight" in state else "visual.head.proj."
    parsed.projection = parsed.take(f"{head}weight")
    bias = parsed.take(f"{head}bias")
    parsed.projection_bias = bias if bias is not None and bias.any() else None
    parsed.find_text_side()
    return parsed


LAYOUT = [
    Layout(
        "open_clip",
        lambda state: has(state, BLOCKS) and has(state, "visual.ln_pre."),
        parse_clip,
    ),
    Layout(
        "openvision",
        lambda state: has(state, BLOCKS) and not has(state, "visual.ln_pre."),
        parse_openvision,
    ),
    Layout("open_clip-timm", lambda state: has(state, TRUNK), parse_timm),
]
