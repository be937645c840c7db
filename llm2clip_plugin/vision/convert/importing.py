"""Turn vision checkpoints into tower directories.

A source is a tower directory of this package (llm2clip.json), a checkpoint in one of the layouts of ``parse.py``, or
``timm:NAME``.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.contracts import TowerCard, naming_full_disk
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.checkpoint import (
    config_in,
    lift_model_cfg,
    merge,
    preprocessor_in,
    read_tensors,
    section,
    weight_files,
)
from llm2clip_plugin.vision.convert.common import OWN_TEXT, ParsedCheckpoint, require
from llm2clip_plugin.vision.convert.layouts import layouts
from llm2clip_plugin.vision.convert.options import parser
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, WEIGHTS_FILE, fetch_directory, read_json, write_json
from llm2clip_plugin.vision.dual import DualEncoder, heads_state
from llm2clip_plugin.vision.export import export_tower, reexport
from llm2clip_plugin.vision.families import families, family_named, family_of_type
from llm2clip_plugin.vision.family import RESAMPLE, DualConfig, Family, Tower
from llm2clip_plugin.vision.publish import summary
from llm2clip_plugin.vision.towers import TIMM_PREFIX, load_tower

# Hugging Face's layout: a vision model, an image-text model, or a release with a text adapter.


def parse_hub(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """A checkpoint whose config.json has the ``model_type`` of a family."""
    family = family_in(state, config)
    anchor = f"{family.file_prefix}embeddings."
    outer = min((key[: key.index(anchor)] for key in state if anchor in key and "text_model." not in key), default="")
    if family.file_prefix and "embeddings.patch_embedding.weight" in state and not any(anchor in key for key in state):
        # transformers 5 omits the Hub's prefix when it saves a model that it did not load from a file
        state = {family.file_prefix + key: value for key, value in state.items()}
    start = outer + family.file_prefix
    inside = [key for key in state if (key.startswith(start) if start else not key.startswith(family.not_tower))]
    counters = [key for key in inside if key.endswith("embeddings.position_ids")]
    parsed = ParsedCheckpoint(
        layout=f"hub-{family.name}",
        state=state,
        config=vision_config(family, config),
        tower={key.removeprefix(outer): state[key] for key in inside if key not in counters},
        used=set(inside),
        left_out=dict.fromkeys(counters, "a counter, not a weight"),
    )
    parent = outer.removesuffix("vision_model.")  # the projection is not part of the tower
    projection = f"{parent}visual_projection.weight"
    parsed.projection = parsed.take(projection)
    parsed.projection_bias = parsed.take(f"{parent}visual_projection.bias")
    parsed.find_text_side("text_model.", "text_projection.", "classifier.")
    if OWN_TEXT in parsed.left_out.values() and parsed.adapter is None:
        check_image_text_model(state, family, config)
    is_projected = "CLIPVisionModelWithProjection" in (config.get("architectures") or [])
    if "visual_projection.weight" in family.image_text_tensors and (is_projected or parsed.is_image_text):
        require(state, projection)
    return parsed


def vision_config(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The complete config.json of the vision model, from its own or from an image-text model's."""
    fields = section(config, "vision_config") or {key: v for key, v in config.items() if key != "vision_config"}
    vision = family.vision_class().config_class.from_dict(fields)
    vision.architectures = [family.vision_class().__name__]
    return json.loads(vision.to_json_string(use_diff=False))


def family_in(state: dict[str, Tensor], config: dict[str, Any]) -> Family:
    """The family of a Hugging Face model, by its own model_type, else by that of its vision part.

    ``siglip2`` is the type of NaFlex models, which accept images of any shape; with a convolution over square patches
    the tensors are those of a fixed-resolution SigLIP, whatever the type is. ValueError for anything else.
    """
    parts = [config, section(config, "vision_config")]
    types = [str(part["model_type"]) for part in parts if "model_type" in part]
    patches = [value for key, value in state.items() if key.endswith("vision_model.embeddings.patch_embedding.weight")]
    if any(name.startswith("siglip2") for name in types):
        if not patches or patches[0].dim() != 4:
            raise ValueError("SigLIP2 NaFlex models are not supported; import a fixed-resolution SigLIP2")
        return family_named("siglip")
    known = {kind for family in families().values() for kind in family.model_types}
    return family_of_type(next((name for name in types if name in known), types[0]), where="config.json")


def check_image_text_model(state: dict[str, Tensor], family: Family, config: dict[str, Any]) -> None:
    """ContractError if tensors next to the tower of an image-text model are missing or misshapen according to its
    configuration: its text tower is left out, but a damaged one means a damaged file."""
    if family.image_text_class is None:
        return
    require(state, *family.image_text_tensors)
    if not section(config, "text_config"):
        return
    model_class = family.image_text_class()
    with torch.device("meta"):  # names and shapes, no memory
        model = model_class(model_class.config_class.from_dict(config)).state_dict()
    shapes = {name: tuple(value.shape) for name, value in model.items() if name.startswith(("text_", "visual_"))}
    require(state, *shapes)
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ContractError(
                f"{name} is {tuple(state[name].shape)}, but config.json specifies {shape}: the tensor is truncated, "
                "or the configuration belongs to another model"
            )


# timm's own layout on the Hub: a config.json with ``architecture`` and ``pretrained_cfg`` next to the weights.

CLASSIFIER = ("head.", "fc.")
NOT_ARGUMENTS = ("num_classes", "in_chans", "img_size")  # of model_args, read elsewhere or without effect on a tower


def parse_timm_hub(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """The model that ``architecture`` names, at the size of ``model_args`` or ``pretrained_cfg``, with its mean."""
    given, published = section(config, "model_args"), section(config, "pretrained_cfg")
    size = given.get("img_size") or (published.get("input_size") or [None])[-1]
    arguments = {name: value for name, value in given.items() if name not in NOT_ARGUMENTS}
    fields = tower_config(str(config["architecture"]), side_of(size), arguments)
    own = {f"image_{key}": published[key] for key in ("mean", "std") if key in published}
    if published.get("interpolation") in RESAMPLE:
        own["resample"] = RESAMPLE[published["interpolation"]]
    inside = {key for key in state if not key.startswith(CLASSIFIER)}
    return ParsedCheckpoint(
        layout="timm",
        state=state,
        config=fields | own,
        tower={f"model.{key}": state[key] for key in state if key in inside},
        used=inside,
        left_out=dict.fromkeys(state.keys() - inside, "classifier"),
    )


def side_of(size: Any) -> int | None:
    """The side of a square image from a number or a pair; ContractError for another shape."""
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise ContractError(f"img_size is {size}; only square images are supported")
    return sides.pop()


def tower_config(name: str, image_size: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the tower that a timm model makes; ValueError for an unknown model or argument."""
    from llm2clip_plugin.vision.timm_tower import make_timm, timm_config

    config = timm_config(make_timm(name, image_size, pretrained=False, arguments=arguments), name, arguments)
    config.architectures = ["TimmTower"]
    return json.loads(config.to_json_string(use_diff=False))


# Recognize the layout of a checkpoint and parse it.


def parse_checkpoint(path: Path, given: dict[str, Any] | None) -> ParsedCheckpoint:
    """Parse a checkpoint file or folder.

    ``given``: the JSON object of --config. Its keys override those of the configuration file in the folder; if it has
    a ``model_type``, it describes a complete model and replaces that file.
    Raises ValueError (unknown layout or architecture), ContractError (a missing, misshapen or unknown tensor).
    """
    state: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else weight_files(path):
        state |= read_tensors(file)
    given = lift_model_cfg(given or {})
    config = given if "model_type" in given else merge(lift_model_cfg(config_in(path, state)), given)
    layout = next((layout for layout in layouts().values() if layout.matches(state)), None)
    if layout is not None:
        parsed = layout.parse(state, config, given)
    elif "model_type" in config:
        parsed = parse_hub(state, config)
    elif "architecture" in config:
        parsed = parse_timm_hub(state, config)
    else:
        raise ValueError(
            f"{path}: the tensor names ({', '.join(sorted(state)[:3])}, ...) match none of the known layouts "
            f"{', '.join(layouts())}; a Hugging Face model needs its config.json, in the same folder or as --config"
        )
    parsed.preprocessor = preprocessor_in(path, config)
    _check_text_side(parsed, given)
    parsed.check_complete(where=str(path))
    return parsed


def _check_text_side(parsed: ParsedCheckpoint, given: dict[str, Any]) -> None:
    """ContractError for an incomplete text side, unless --config (``given``) states that the release has no logit scale
    (``logit_scale_init_value``) or no bias after the adapter (``text_cfg.proj_bias``)."""
    start, adapter = given.get("logit_scale_init_value"), parsed.adapter
    if parsed.logit_scale is None and (adapter is not None or OWN_TEXT in parsed.left_out.values()):
        if not isinstance(start, int | float):
            raise ContractError(
                "the checkpoint is missing logit_scale; if it never had one, set the initial value: --config with "
                '{"logit_scale_init_value": 2.6592} (a natural logarithm; CLIP starts at 2.6592)'
            )
        parsed.logit_scale = torch.tensor(float(start))
    if adapter is None:
        return
    last = adapter.names["projection.weight"]
    is_reference = last.split(".")[-3] in ("text_adaptor", "adaptor")  # the reference's adapter has a bias
    if is_reference and "projection.bias" not in adapter.names and section(given, "text_cfg").get("proj_bias", True):
        raise ContractError(
            f"the checkpoint is missing {last.replace('weight', 'bias')}; if it never had one, pass --config with "
            '{"text_cfg": {"proj_bias": false}}'
        )


def import_tower(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    replace: bool = False,
) -> tuple[TowerCard, list[str]]:
    """Write ``source`` (file, directory, Hub id or timm:NAME) as a tower directory; returns its card and a report.

    ``config``: a config.json (Hugging Face's, EVA-CLIP's or OpenCLIP's) for a source that has none and whose tensors
    don't determine the architecture, or fields that override the source's own. ``image_size``, in pixels, interpolates
    the positions if it is not the source's own; the card records it.
    Raises FileNotFoundError, ValueError (architecture unknown), ContractError (an unknown, missing or
    misshapen tensor; a file that is truncated or contains code).
    """
    if str(source).startswith(TIMM_PREFIX):
        if config is not None:
            raise ValueError(f"{source}: timm describes the architecture; remove --config")
        model, imported_as = load_tower(source, image_size=image_size), "timm"
        origin, report = str(source), [f"layout timm: {len(model.state_dict())} tensors of the tower"]
    else:
        path = Path(source).expanduser()
        place = path if path.is_file() else fetch_directory(source)
        if place.is_dir() and (place / TowerCard.FILE).is_file():
            old_size = TowerCard.read(place / TowerCard.FILE).image_size
            card = reexport(place, output, image_size=image_size, replace=replace)
            resized = f"positions interpolated from {old_size} to {card.image_size} px"
            change = "weights verified and unchanged" if card.image_size == old_size else resized
            return card, [f"a tower directory: {change}"]
        parsed = parse_checkpoint(place, None if config is None else read_json(Path(config)))
        with naming_full_disk(output):
            model = build_model(parsed, str(source), temporary=Path(output).resolve().parent, image_size=image_size)
        imported_as, report = parsed.layout, parsed.report()
        origin = path.name if path.exists() else str(source)
    card = export_tower(model, output, origin=origin, training={"imported_as": imported_as}, replace=replace)
    if (old_size := card.training.get("resized_from")) is not None:
        report.append(f"positions interpolated from {old_size} to {card.image_size} px")
    return card, report


def build_model(parsed: ParsedCheckpoint, source: str, *, temporary: Path, image_size: int | None = None) -> nn.Module:
    """A parsed checkpoint as a dual encoder, or as a tower if it contains nothing else.

    ``temporary``: folder for temporary files of the tower's size. ``source``: for error messages.
    """
    tower = _build_tower(parsed, source, temporary=temporary, image_size=image_size)
    if parsed.projection is None and parsed.adapter is None and parsed.logit_scale is None:
        return tower
    dual = DualEncoder(tower, _dual_config(parsed, tower, source))
    state, expected = _heads(parsed), heads_state(dual)
    missing = sorted(expected.keys() - state.keys() - {"logit_scale"})  # which then keeps CLIP's initial value
    wrong = sorted(name for name in state if name not in expected or state[name].shape != expected[name].shape)
    if missing or wrong:
        raise ContractError(f"{source}: missing tensors {missing}, unexpected or misshapen tensors {wrong}")
    dual.load_state_dict(state, strict=False)  # the tower is loaded; the rest was just checked
    return dual


def _build_tower(parsed: ParsedCheckpoint, source: str, *, temporary: Path, image_size: int | None) -> Tower:
    """The tower, loaded as strictly as any tower directory."""
    from safetensors.torch import save_file

    temporary.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=temporary, prefix=".import-") as name:
        folder = Path(name)
        write_json(folder / "config.json", parsed.config)
        write_json(folder / PREPROCESSOR_FILE, parsed.preprocessor)
        tensors = {name: value.contiguous().clone() for name, value in parsed.tower.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        try:
            return load_tower(folder, image_size=image_size)
        except ContractError as error:
            raise ContractError(str(error).replace(name, source)) from error


def _dual_config(parsed: ParsedCheckpoint, tower: Tower, source: str) -> DualConfig:
    """The configuration of the heads; ContractError if the widths of projection, adapter and tower don't match."""
    adapter, projection, width = parsed.adapter, parsed.projection, tower.config.hidden_size
    if projection is not None and projection.shape[-1] != width:
        raise ContractError(
            f"{source}: the visual projection is {tuple(projection.shape)}, expected (projection_dim, {width})"
        )
    width = width if projection is None else projection.shape[0]
    if adapter is not None and adapter.projection_dim != width:
        widths = f"image features have width {width}, but the text adapter's outputs {adapter.projection_dim}"
        raise ContractError(f"{source}: {widths}; one of them belongs to another model")
    config = DualConfig(
        projection_dim=width,
        projection="none" if projection is None else "linear",
        projection_bias=parsed.projection_bias is not None,
        logit_scale_init=None if parsed.logit_scale is None else float(parsed.logit_scale),
        logit_bias_init=None if parsed.logit_bias is None else float(parsed.logit_bias),
    )
    if adapter is None:
        return config
    return dataclasses.replace(
        config,
        llm_width=adapter.llm_width,
        adapter_blocks=adapter.blocks,
        adapter_expansion=adapter.expansion,
        normalise_input=adapter.normalise_input,
    )


def _heads(parsed: ParsedCheckpoint) -> dict[str, Tensor]:
    """Everything but the tower, under our names."""
    adapter = {} if parsed.adapter is None else parsed.adapter.state
    tensors = {
        "visual_projection.weight": parsed.projection,
        "visual_projection.bias": parsed.projection_bias,
        "logit_scale": None if parsed.logit_scale is None else parsed.logit_scale.reshape(1),
        "logit_bias": None if parsed.logit_bias is None else parsed.logit_bias.reshape(1),
    }
    tensors |= {f"text_adapter.{name}": value for name, value in adapter.items()}
    return {name: value for name, value in tensors.items() if value is not None}


# ``llm2clip import SOURCE --output DIR``.


def main(argv: list[str]) -> int:
    """Import a checkpoint, print what was matched and what was ignored."""
    options = parser().parse_args(argv)
    card, report = import_tower(
        options.source, options.output, config=options.config, image_size=options.image_size, replace=options.overwrite
    )
    print("\n".join([*report, summary(options.output, card)]))
    return 0
