"""Layouts that config.json tells, as their tensors have no names in common: Hugging Face's models,
and timm's.

Hugging Face's: a vision model, an image-text model, or a release with a text adapter. timm's: a
config.json with ``architecture`` and ``pretrained_cfg`` next to the weights. Qwen3-VL's tower
becomes timm's model of it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.layouts import (
    OWN_TEXT,
    Layout,
    ParsedCheckpoint,
    depth,
    normalization,
    qwen25_vl,
    require,
)
from llm2clip_plugin.vision.directory import section
from llm2clip_plugin.vision.families import (
    Family,
    families,
    family_of_type,
    no_family,
)
from llm2clip_plugin.vision.wrapped import check_block_tokens, make_timm, timm_config

# of timm's models; the last is Qwen3-VL's projector
CLASSIFIER = ("head.", "fc.", "merger.")
QWEN = "model.visual."  # where the tower of Qwen3-VL or Qwen3.5 is
# prefixes of the text towers of image-text models, and of heads of other tasks
OWN_TEXT_PREFIXES = ("text_model.", "text_encoder.", "text_projection.", "classifier.")
TIPSV2_TEMPERATURE = 0.005065968260169029  # where config.json leaves out its default
# of model_args, read elsewhere or without effect on a tower
NOT_ARGUMENTS = ("num_classes", "in_chans", "img_size")


def parse_hub(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """A checkpoint whose config.json has the ``model_type`` of a family."""
    family = family_in(state, config)
    anchor = f"{family.file_prefix}embeddings."
    has_anchor = [key for key in state if anchor in key]
    outer_prefixes: list[str] = []
    for key in has_anchor:
        if "text_model." not in key:
            outer_prefixes.append(key[: key.index(anchor)])
    outer = min(outer_prefixes, default="")
    has_tower = "embeddings.patch_embedding.weight" in state
    if family.file_prefix and has_tower and not has_anchor:
        # transformers 5 omits the Hub's prefix when it saves a model that it did not load from a
        # file
        state = {family.file_prefix + key: value for key, value in state.items()}
    start = outer + family.file_prefix
    if start:
        inside = [key for key in state if key.startswith(start)]
    else:
        inside = [key for key in state if not key.startswith(family.not_tower)]
    counters = [key for key in inside if key.endswith("embeddings.position_ids")]
    tower: dict[str, Tensor] = {}
    for key in inside:
        if key not in counters:
            tower[key.removeprefix(outer)] = state[key]
    parsed = ParsedCheckpoint(
        layout=f"hub-{family.name}",
        state=state,
        config=vision_config(family, config),
        tower=tower,
        used=set(inside),
        left_out=dict.fromkeys(counters, "a counter, not a weight"),
    )
    # the projection is not part of the tower
    parent = outer.removesuffix("vision_model.")
    projection = f"{parent}visual_projection.weight"
    parsed.projection = parsed.take(projection)
    parsed.projection_bias = parsed.take(f"{parent}visual_projection.bias")
    parsed.find_text_side(OWN_TEXT_PREFIXES)
    if family.name == "tipsv2":
        parsed.logit_scale = scale_of_temperature(parsed, config)
    if OWN_TEXT in parsed.left_out.values() and parsed.adapter is None:
        require(state, *family.image_text_tensors)
    architectures = config.get("architectures") or []
    is_projected = "CLIPVisionModelWithProjection" in architectures
    has_projection = "visual_projection.weight" in family.image_text_tensors
    if has_projection and (is_projected or parsed.is_image_text):
        require(state, projection)
        rows = state[projection].shape[0]
        stated = config.get("projection_dim")
        if parsed.adapter is None and stated not in (None, rows):
            raise ContractError(
                f"{projection} has {rows} rows, but config.json specifies projection_dim {stated}"
            )
    return parsed


def scale_of_temperature(
    parsed: ParsedCheckpoint, config: Mapping[str, Any]
) -> Tensor | None:
    """The logarithm of TIPSv2's logit scale, whose reciprocal its files name ``temperature``;
    published ones have it in config.json alone. None for a vision model."""
    temperature = parsed.take("temperature")
    if temperature is None and OWN_TEXT in parsed.left_out.values():
        stated = config.get("temperature_init_value", TIPSV2_TEMPERATURE)
        temperature = torch.tensor(float(stated))
    return None if temperature is None else -temperature.log()


def vision_config(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The complete config.json of the vision model, from its own or from an image-text model's."""
    fields = dict(section(config, "vision_config"))
    if not fields:
        fields = dict(config)
        fields.pop("vision_config", None)
    # the weights are read as they are; quantized ones are refused
    fields.pop("quantization_config", None)
    vision = family.vision_class().config_class.from_dict(fields)
    vision.architectures = [family.vision_class().__name__]
    return json.loads(vision.to_json_string(use_diff=False))


def family_in(state: dict[str, Tensor], config: dict[str, Any]) -> Family:
    """The family of a Hugging Face model, by its own model_type, else by that of its vision part.

    ``siglip2`` is the type of SigLIP 2 NaFlex, and of some files with a fixed resolution.
    ValueError if unknown.
    """
    parts = [config, section(config, "vision_config")]
    types = [str(part["model_type"]) for part in parts if "model_type" in part]
    if any(name.startswith("siglip2") for name in types):
        weights = (
            state[key]
            for key in state
            if key.endswith("embeddings.patch_embedding.weight")
        )
        return families()[
            "naflex" if any(weight.dim() == 2 for weight in weights) else "siglip"
        ]
    model_types = {
        kind for family in families().values() for kind in family.model_types
    }
    kind = next((name for name in types if name in model_types), types[0])
    return family_of_type(kind, where="config.json")


# tensors of a language model that is more than a text encoder
LANGUAGE = re.compile(r"(^|\.)(language_model|lm_head)\.|^model\.layers\.")


def refuse_language_model(
    path: Path, state: Mapping[str, Tensor], config: dict[str, Any]
) -> None:
    """ValueError for a vision-language model that no layout reads, before its tensors are taken for
    those of another model: Qwen2-VL's tower has the names of an EVA-CLIP's."""
    kind = str(config.get("model_type"))
    model_types = {
        kind for family in families().values() for kind in family.model_types
    }
    is_qwen = LAYOUT.matches(dict(state)) or qwen25_vl.LAYOUT.matches(dict(state))
    if kind in model_types or is_qwen:
        return
    if section(config, "vision_config") and any(
        LANGUAGE.search(name) for name in state
    ):
        raise ValueError(f"{path} {no_family(kind, config)}")


def parse_timm_hub(
    state: dict[str, Tensor], config: dict[str, Any]
) -> ParsedCheckpoint:
    """The model that ``architecture`` names, at the size of ``model_args`` or ``pretrained_cfg``,
    with its mean."""
    model_args = section(config, "model_args")
    published = section(config, "pretrained_cfg")
    size = model_args.get("img_size")
    if not size and published.get("input_size"):
        size = published["input_size"][-1]
    arguments: dict[str, Any] = {}
    for name, value in model_args.items():
        if name not in NOT_ARGUMENTS:
            arguments[name] = value
    fields = timm_fields(str(config["architecture"]), side_of(size), arguments)
    inside = {key for key in state if not key.startswith(CLASSIFIER)}
    return ParsedCheckpoint(
        layout="timm",
        state=state,
        config=fields | normalization(published),
        tower={f"model.{key}": state[key] for key in state if key in inside},
        used=inside,
        left_out=dict.fromkeys(state.keys() - inside, "a classifier or projector"),
    )


def parse_qwen(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """timm's model of the tower, at the size of its position table. Both frames of a patch (H, 3,
    2, P, P) are one image: their weights add up. ValueError without ``num_heads``, ContractError
    without tensors that tell sizes."""
    require(
        state, f"{QWEN}patch_embed.proj.weight", f"{QWEN}blocks.0.mlp.linear_fc1.bias"
    )
    vision = section(config, "vision_config") or config  # of the vision model alone
    if not (heads := vision.get("num_heads")):
        raise ValueError(
            "Qwen3-VL's tower needs vision_config.num_heads; pass the model's config.json as "
            "--config"
        )
    used = {name for name in state if name.startswith(QWEN) and "merger" not in name}
    tower = {
        name.replace(QWEN, "model.").replace(".linear_fc", ".fc"): state[name]
        for name in used
    }
    patches = tower["model.patch_embed.proj.weight"]
    positions = tower.pop("model.pos_embed.weight")
    width = positions.shape[1]
    side = patches.shape[-1]
    grid = math.isqrt(len(positions))
    tower |= {
        "model.patch_embed.proj.weight": patches.double().sum(2),
        "model.pos_embed": positions[None],
    }
    sizes = {
        "embed_dim": width,
        "depth": depth(state, f"{QWEN}blocks."),
        "num_heads": heads,
        "patch_size": side,
    }
    sizes |= {
        "mlp_ratio": len(tower["model.blocks.0.mlp.fc1.bias"]) / width,
        "pos_embed_grid_size": grid,
    }
    fields = timm_fields("qwen3_vit_416m_enc", grid * side, sizes)
    left_out = dict.fromkeys(state.keys() - used, "language model or projector")
    return ParsedCheckpoint(
        state=state, config=fields, tower=tower, used=used, left_out=left_out
    )


LAYOUT = Layout(
    "qwen3-vl", lambda state: f"{QWEN}pos_embed.weight" in state, parse_qwen
)


def side_of(size: Any) -> int | None:
    """The side of a square image from a number or a pair; ContractError for another shape."""
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise ContractError(f"img_size is {size}; only square images are supported")
    return sides.pop()


def timm_fields(
    name: str, image_size: int | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of the tower that a timm model makes; ValueError for an unknown model or
    argument."""
    model = make_timm(name, image_size, pretrained=False, arguments=arguments)
    config = timm_config(model, name, arguments)
    check_block_tokens(model, config)
    config.architectures = ["TimmTower"]
    return json.loads(config.to_json_string(use_diff=False))
