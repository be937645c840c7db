"""Turn vision checkpoints into tower directories.

| checkpoint                                        | recognized by                         | layouts/            |
|---------------------------------------------------|---------------------------------------|---------------------|
| LLM2CLIP-EVA02-*.pt, EVA-CLIP, timm's EVA02       | visual.blocks.*, visual.trunk.*.fc1_g | eva_clip.py         |
| OpenCLIP CLIP                                     | visual.transformer.resblocks.*        | open_clip.py        |
| OpenCLIP SigLIP                                   | visual.trunk.attn_pool.*              | open_clip_siglip.py |
| OpenCLIP, other towers of timm (PE)               | visual.trunk.*                        | open_clip_timm.py   |
| OpenVision                                        | no visual.ln_pre                      | openvision.py       |
| timm's own, on the Hub                            | config.json with an architecture      | hub.py              |
| HF model, LLM2CLIP-Openai-*, LLM2CLIP-*-siglip2-* | config.json with a known model_type   | hub.py              |
"""

import dataclasses
import os
import tempfile
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
from llm2clip_plugin.vision.convert import IMPORT
from llm2clip_plugin.vision.convert.common import OWN_TEXT, ParsedCheckpoint
from llm2clip_plugin.vision.convert.layouts import layouts
from llm2clip_plugin.vision.convert.layouts.hub import parse_hub, parse_timm_hub
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, WEIGHTS_FILE, fetch_directory, read_json, write_json
from llm2clip_plugin.vision.dual import DualEncoder, heads_state
from llm2clip_plugin.vision.export import export_tower, reexport
from llm2clip_plugin.vision.family import DualConfig, Tower
from llm2clip_plugin.vision.publish import summary
from llm2clip_plugin.vision.towers import TIMM_PREFIX, load_tower


def main(argv: list[str]) -> int:
    """Import a checkpoint, print what was matched and what was ignored."""
    options = IMPORT.parse(argv)
    card, report = import_tower(
        options.source, options.output, config=options.config, image_size=options.image_size, replace=options.overwrite
    )
    print("\n".join([*report, summary(options.output, card)]))
    return 0


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
