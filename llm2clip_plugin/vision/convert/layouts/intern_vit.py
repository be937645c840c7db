"""InternViT as OpenGVLab's own code writes it: ``encoder.layers.*.ls1``. It becomes transformers'
InternVLVisionModel, so nothing of that code is run."""

import json
import re
from typing import Any

from torch import Tensor

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.layouts import (
    Layout,
    ParsedCheckpoint,
    depth,
    patch_shape,
    require,
)
from llm2clip_plugin.vision.families import families

OUTSIDE = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}
IN_BLOCK = {
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.projection_layer.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "mlp.": "mlp.",
}
FUSED = "attn.qkv."  # queries, keys and values in one tensor
BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
# fields of config.json that transformers' class has under the same names
SAME_FIELDS = ("hidden_act", "layer_norm_eps", "num_attention_heads")


def translate(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The tower's tensors under transformers' names, and the names in ``state`` that they are
    from. ContractError for q, k and v that are not three equal parts."""
    tower: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, value in state.items():
        match = BLOCK.fullmatch(name)
        if name in OUTSIDE:
            tower[OUTSIDE[name]] = value
            used.add(name)
        elif match and match[2].startswith(FUSED):
            if len(value) % 3:
                raise ContractError(
                    f"{name} is {tuple(value.shape)}, expected a multiple of 3 rows (q, k, v)"
                )
            kind = match[2].removeprefix(FUSED)
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                tower[f"encoder.layer.{match[1]}.attention.{part}_proj.{kind}"] = rows
            used.add(name)
        elif match and (inside := translate_in_block(match[2])):
            tower[f"encoder.layer.{match[1]}.{inside}"] = value
            used.add(name)
    return tower, used


def translate_in_block(name: str) -> str:
    """Transformers' name of a tensor of a block; "" for an unknown one."""
    for theirs, ours in IN_BLOCK.items():
        if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
            return ours + name.removeprefix(theirs)
    return ""


def parse_intern_vit(
    state: dict[str, Tensor], config: dict[str, Any]
) -> ParsedCheckpoint:
    """Sizes are read from the tensors, heads, activation and epsilon from config.json; ValueError
    without heads, ContractError without tensors that tell sizes."""
    block = "encoder.layers.0."
    patches = "embeddings.patch_embedding.weight"
    positions = "embeddings.position_embedding"
    require(state, patches, positions, f"{block}mlp.fc1.weight", f"{block}norm1.weight")
    if "num_attention_heads" not in config:
        raise ValueError(
            "InternViT needs num_attention_heads; pass the model's config.json as --config"
        )
    width, patch = patch_shape(state, patches)
    if state[positions].dim() != 3:
        raise ContractError(
            f"{positions} is {tuple(state[positions].shape)}, expected (1, tokens, width)"
        )
    grid = round((state[positions].shape[1] - 1) ** 0.5)
    fields = {name: config[name] for name in SAME_FIELDS if name in config}
    fields |= {
        "hidden_size": width,
        "intermediate_size": len(state[f"{block}mlp.fc1.weight"]),
        "num_hidden_layers": depth(state, "encoder.layers."),
        "image_size": grid * patch,
        "patch_size": patch,
        "attention_bias": f"{block}attn.qkv.bias" in state,
        "use_qk_norm": f"{block}attn.q_norm.weight" in state,
        "norm_type": "layer_norm" if f"{block}norm1.bias" in state else "rms_norm",
        "use_mean_pooling": True,  # that is, without a norm after the blocks
    }
    vision_class = families()["internvl"].vision_class()
    settings = vision_class.config_class(**fields)
    settings.architectures = [vision_class.__name__]
    tower, used = translate(state)
    return ParsedCheckpoint(
        state=state,
        config=json.loads(settings.to_json_string(use_diff=False)),
        tower=tower,
        used=used,
    )


LAYOUT = Layout(
    "intern-vit", lambda state: "encoder.layers.0.ls1" in state, parse_intern_vit
)
