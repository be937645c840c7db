"""Layouts of checkpoints: what a state dict holds, every tensor given a place or a reason to be left out.

| layout                                            | told by                                  | read by         |
|---------------------------------------------------|------------------------------------------|-----------------|
| HF model, LLM2CLIP-Openai-*, LLM2CLIP-*-siglip2-* | config.json with a known model_type      | parse_hub       |
| LLM2CLIP-EVA02-*.pt, EVA-CLIP, timm's EVA02       | visual.blocks.*, visual.trunk.*.fc1_g    | parse_eva       |
| OpenCLIP CLIP                                     | visual.transformer.resblocks.*           | parse_open_clip |
| OpenCLIP SigLIP                                   | visual.trunk.attn_pool.*                 | parse_open_clip |
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert import eva_names, open_clip_names
from llm2clip_plugin.vision.convert.adapter_match import AdapterMatch, candidate_prefixes, match_adapter
from llm2clip_plugin.vision.convert.checkpoints import read_tensors, require, weight_files
from llm2clip_plugin.vision.convert.source_config import config_beside, opened, over, preprocessor_beside, section
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.family import Family
from llm2clip_plugin.vision.towers import family_named, family_of_type

OWN_TEXT = "the model's own text tower; the LLM takes its place"
OWN_TEXT_NAMES = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
)
DERIVED = "computed anew from the configuration (checked against it)"


@dataclass
class Parsed:
    """A checkpoint taken apart: what the tower gets, what goes beside it, what is left out and why."""

    format: str
    config: dict[str, Any]  # config.json of the vision model
    tower: dict[str, Tensor]  # under the hub's names
    names: dict[str, str]  # our name -> the source's name (joined by + where two became one)
    projection: Tensor | None = None  # (D, H)
    projection_bias: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    adapter: AdapterMatch | None = None
    left_out: dict[str, str] = field(default_factory=dict)  # the source's name -> reason
    preprocessor: dict[str, Any] = field(default_factory=dict)


def parse(place: Path, told: dict[str, Any] | None) -> Parsed:
    """Take a checkpoint apart; ``told`` is the JSON object that the user gave, if any: its keys go over those of the
    file beside the checkpoint, and one with a ``model_type``, which describes a whole model, stands for that file."""
    state: dict[str, Tensor] = {}
    for file in [place] if place.is_file() else weight_files(place):
        state |= read_tensors(file)
    told = opened(told or {})
    config = told if "model_type" in told else over(opened(config_beside(place, state)), told)
    if open_clip_names.is_timm_eva(state):
        state = open_clip_names.timm_eva_as_eva(state)
    if eva_names.is_eva(state):
        state = eva_names.unpacked(state)
        # a config.json that merely lies beside may be of another kind, or name a timm model; the tensors say enough
        described = "width" in section(config, "vision_cfg") or section(told, "vision_cfg") or "model_type" in told
        parsed = parse_eva(state, config if described else None)
    elif open_clip_names.is_clip(state) or open_clip_names.is_siglip(state):
        parsed = parse_open_clip(state, config)
    elif "model_type" in config:
        parsed = parse_hub(state, config)
    else:
        raise ValueError(
            f"{place}: by its tensors neither EVA-CLIP nor OpenCLIP ({', '.join(sorted(state)[:3])}, ...); "
            "a Hugging Face model needs its config.json, beside it or as --config"
        )
    parsed.preprocessor = preprocessor_beside(place, config)
    _require_text_side(parsed, told)
    _account(parsed, state, where=str(place))
    return parsed


def _require_text_side(parsed: Parsed, told: dict[str, Any]) -> None:
    """ContractError for a text side that is not whole; ``told`` is the user's own config.json, which may say that a
    release has no logit scale (``logit_scale_init_value``) or no bias behind the adapter (``text_cfg.proj_bias``)."""
    start, adapter = told.get("logit_scale_init_value"), parsed.adapter
    if parsed.logit_scale is None and (adapter is not None or OWN_TEXT in parsed.left_out.values()):
        if not isinstance(start, int | float):
            raise ContractError(
                "the checkpoint lacks logit_scale; if it never had one, say where to start: --config with "
                '{"logit_scale_init_value": 2.6592} (a natural logarithm; this is where CLIP starts)'
            )
        parsed.logit_scale = torch.tensor(float(start))
    if adapter is None:
        return
    last = adapter.names["projection.weight"]
    known = last.split(".")[-3] in ("text_adaptor", "adaptor")  # the reference's own, which has a bias
    if known and "projection.bias" not in adapter.names and section(told, "text_cfg").get("proj_bias", True):
        raise ContractError(
            f"the checkpoint lacks {last.replace('weight', 'bias')}; if it never had one, say so: --config with "
            '{"text_cfg": {"proj_bias": false}}'
        )


def parse_eva(state: dict[str, Tensor], config: dict[str, Any] | None) -> Parsed:
    """EVA-CLIP's layout: ``visual.*``, ``text.*`` (adapter or EVA-CLIP's own text tower), ``logit_scale``."""
    if config is not None and "width" not in section(config, "vision_cfg"):
        raise ValueError(f"the configuration of an EVA-CLIP tower has vision_cfg.width; this one has {sorted(config)}")
    tower_config = (
        eva_names.config_from_tensors(state) if config is None else eva_names.config_from_fields(config["vision_cfg"])
    )
    tower_config.architectures = ["Eva02VisionModel"]
    tower, names = eva_names.tower_state(state, tower_config)
    parsed = Parsed("eva-clip", json.loads(tower_config.to_json_string(use_diff=False)), tower, names)
    parsed.left_out.update(dict.fromkeys(eva_names.check_rope_tables(state, tower_config), DERIVED))
    parsed.projection = _take(parsed, state, "visual.head.weight")
    parsed.projection_bias = _take(parsed, state, "visual.head.bias")
    own_text = tuple(f"text.{name}" for name in (*OWN_TEXT_NAMES, "cls_emb", "proj."))
    _take_text_side(parsed, state, own_text=own_text)
    require(state, "visual.head.weight", "visual.head.bias")
    return parsed


def parse_open_clip(state: dict[str, Tensor], config: dict[str, Any]) -> Parsed:
    """OpenCLIP's layout: CLIP (``visual.transformer``) or SigLIP (``visual.trunk``), with any text side."""
    if open_clip_names.is_clip(state):
        fields = open_clip_names.clip_config(state, config)
        parsed = Parsed("open_clip", fields, *open_clip_names.clip_state(state))
        projection = _take(parsed, state, "visual.proj")  # (H, D): OpenCLIP multiplies from the right
        parsed.projection = None if projection is None else projection.T.contiguous()
    else:
        fields = open_clip_names.siglip_config(state, config)
        parsed = Parsed("open_clip-siglip", fields, *open_clip_names.siglip_state(state))
        parsed.projection = _take(parsed, state, "visual.head.proj.weight")
    own_text = (*OWN_TEXT_NAMES, *(f"text.{name}" for name in (*OWN_TEXT_NAMES, "cls_emb", "proj.")))
    _take_text_side(parsed, state, own_text=own_text)
    if parsed.format == "open_clip" and _has_joint_space(parsed):
        require(state, "visual.proj")
    return parsed


def _has_joint_space(parsed: Parsed) -> bool:
    """Whether images are compared with texts in a checkpoint: a CLIP then has a projection."""
    beside = (parsed.adapter, parsed.logit_scale)
    return any(part is not None for part in beside) or OWN_TEXT in parsed.left_out.values()


def parse_hub(state: dict[str, Tensor], config: dict[str, Any]) -> Parsed:
    """Hugging Face's layout: a vision model alone, a whole model, or a release with a text adapter beside."""
    family = hub_family(state, config)
    if config.get("vision_config") is None:
        own = {key: value for key, value in config.items() if key != "vision_config"}
    else:
        own = section(config, "vision_config")
    vision = family.vision_class().config_class.from_dict(own)
    vision.architectures = [family.vision_class().__name__]
    fields = json.loads(vision.to_json_string(use_diff=False))
    anchor = f"{family.file_prefix}embeddings."
    outer = min((key[: key.index(anchor)] for key in state if anchor in key and "text_model." not in key), default=None)
    if outer is None and family.file_prefix and "embeddings.patch_embedding.weight" in state:
        # transformers 5 saves a model that it made itself (not loaded) without the hub's prefix
        parsed = parse_hub({family.file_prefix + key: value for key, value in state.items()}, config)
        parsed.names = {ours: theirs.removeprefix(family.file_prefix) for ours, theirs in parsed.names.items()}
        return parsed
    outer = outer or ""
    start = outer + family.file_prefix
    inside = (
        [key for key in state if key.startswith(start)]
        if start
        else [key for key in state if not key.startswith(family.beside_tower)]
    )
    names = {key.removeprefix(outer): key for key in inside if not key.endswith("embeddings.position_ids")}
    tower = {ours: state[theirs] for ours, theirs in names.items()}
    parsed = Parsed(f"hub-{family.name}", fields, tower, names)
    for key in inside:
        if key.endswith("embeddings.position_ids"):
            parsed.left_out[key] = "a counter, no weight"
    parsed.projection = _take(parsed, state, f"{outer}visual_projection.weight")
    parsed.projection_bias = _take(parsed, state, f"{outer}visual_projection.bias")
    _take_text_side(parsed, state, own_text=("text_model.", "text_projection.", "classifier."))
    if OWN_TEXT in parsed.left_out.values() and parsed.adapter is None and family.name in ("clip", "siglip"):
        _require_whole(state, family, config)
    projects = "CLIPVisionModelWithProjection" in (config.get("architectures") or [])
    if family.name == "clip" and (projects or _has_joint_space(parsed)):
        require(state, f"{outer}visual_projection.weight")
    return parsed


def _require_whole(state: dict[str, Tensor], family: Family, config: dict[str, Any]) -> None:
    """ContractError where a whole CLIP or SigLIP lacks, or has in another shape, what its configuration says it holds
    beside the vision model: its own text tower is left out, but a damaged one means a damaged file."""
    import transformers

    require(state, *(["logit_bias"] if family.name == "siglip" else []))
    if not section(config, "text_config"):
        return
    whole: Any = transformers.SiglipModel if family.name == "siglip" else transformers.CLIPModel
    with torch.device("meta"):  # names and shapes, no memory
        model = whole(whole.config_class.from_dict(config)).state_dict()
    beside = {name: tuple(value.shape) for name, value in model.items() if name.startswith(("text_", "visual_"))}
    require(state, *beside)
    for name, shape in beside.items():
        if state[name].shape != shape:
            raise ContractError(f"{name} is {tuple(state[name].shape)}, config.json says {shape}: cut, or another's?")


def hub_family(state: dict[str, Tensor], config: dict[str, Any]) -> Family:
    """The family of a Hugging Face model: by its own model_type, else by that of its vision part.

    ``siglip2`` is the name of NaFlex models, which take images of any shape; with a convolution over square patches
    the tensors are those of a fixed-resolution SigLIP, whatever the name. ValueError for anything else.
    """
    types = [config, section(config, "vision_config")]
    names = [str(part["model_type"]) for part in types if "model_type" in part]
    patches = [value for key, value in state.items() if key.endswith("vision_model.embeddings.patch_embedding.weight")]
    if any(name.startswith("siglip2") for name in names):
        if not patches or patches[0].dim() != 4:
            raise ValueError("this SigLIP2 takes images of any shape (NaFlex); import a fixed-resolution one")
        return family_named("siglip")
    known = [name for name in names if any(name in family.model_types for family in families().values())]
    return family_of_type(known[0] if known else names[0], where="config.json")


def _take(parsed: Parsed, state: dict[str, Tensor], name: str) -> Tensor | None:
    """A tensor that goes beside the tower, noted as used; None if the source lacks it."""
    if name not in state:
        return None
    parsed.names[f"beside:{name}"] = name
    return state[name]


def _take_text_side(parsed: Parsed, state: dict[str, Tensor], *, own_text: tuple[str, ...]) -> None:
    """Logit scale and bias, and the adapter by structure; then whatever lies under ``own_text`` is left out."""
    used = {old for names in parsed.names.values() for old in names.split("+")} | set(parsed.left_out)
    for name in [key for key in state if key.split(".")[-1] in ("logit_scale", "logit_bias")]:
        if state[name].numel() != 1:
            raise ContractError(f"{name} is {tuple(state[name].shape)}, expected one number")
        setattr(parsed, name.split(".")[-1], _take(parsed, state, name))
        used.add(name)
    rest = [key for key in state if key not in used]
    found = [match for prefix in candidate_prefixes(rest) if (match := match_adapter(state, prefix)) is not None]
    if len(found) > 1:
        raise ContractError(f"several text adapters: {[next(iter(match.names.values())) for match in found]}")
    if found:
        parsed.adapter = found[0]
        used |= set(found[0].names.values())
    for key in rest:
        if key not in used and key.startswith(own_text):
            parsed.left_out[key] = OWN_TEXT


def _account(parsed: Parsed, state: dict[str, Tensor], *, where: str) -> None:
    """ContractError if a tensor of the source has neither a place nor a reason to be left out."""
    used = {old for names in parsed.names.values() for old in names.split("+")} | set(parsed.left_out)
    if parsed.adapter is not None:
        used |= set(parsed.adapter.names.values())
    if unused := sorted(set(state) - used):
        raise ContractError(
            f"{where}: {len(unused)} of {len(state)} tensors have no place in a {parsed.format} model: {unused[:10]}; "
            "a renamed tensor, or an architecture that --config doesn't describe"
        )


def report(parsed: Parsed) -> list[str]:
    """What was matched and what was left out, for people."""
    lines = [f"read as {parsed.format}: {len(parsed.tower)} tensors of the tower"]
    if parsed.projection is not None:
        lines.append(
            f"projection {tuple(parsed.projection.shape)}{'' if parsed.projection_bias is None else ' with bias'}"
        )
    if (adapter := parsed.adapter) is not None:
        lines.append(
            f"text adapter matched by structure: {adapter.blocks} blocks of {adapter.llm_width} x {adapter.expansion}, "
            f"then {adapter.llm_width} -> {adapter.projection_dim}"
        )
        lines += [f"  {theirs} -> text_adapter.{ours}" for ours, theirs in adapter.names.items()]
        lines += [f"  {note}" for note in adapter.notes]
    for reason in sorted(set(parsed.left_out.values())):
        names = [name for name, why in parsed.left_out.items() if why == reason]
        lines.append(f"left out, {reason}: {len(names)} tensors ({', '.join(sorted(names)[:3])} ...)")
    return lines
