"""Turn vision checkpoints into tower directories.

| checkpoint                                   | recognized by                    | layouts/      |
|----------------------------------------------|----------------------------------|---------------|
| LLM2CLIP-EVA02-*.pt, EVA-CLIP                | visual.blocks.*                  | eva_clip.py   |
| OpenCLIP CLIP                                | visual.transformer.resblocks.*   | open_clip.py  |
| OpenVision                                   | no visual.ln_pre                 | open_clip.py  |
| OpenCLIP, towers of timm (PE, SigLIP, EVA02) | visual.trunk.*                   | open_clip.py  |
| timm's own, on the Hub                       | config.json with an architecture | hub.py        |
| InternViT, by OpenGVLab's own code           | encoder.layers.*.ls1             | intern_vit.py |
| Qwen2.5-VL                                   | visual.blocks.*.mlp.gate_proj    | qwen25_vl.py  |
| Qwen3-VL, Qwen3.5                            | model.visual.pos_embed           | hub.py        |
| Hugging Face, LLM2CLIP-Openai-*, *-siglip2-* | config.json with a model_type    | hub.py        |

With ``--part vision``, ``vlm.py`` reads the tower of a vision-language model for these.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.atomic import naming_full_disk
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.vision import export
from llm2clip_plugin.vision.convert import IMPORT, PART, vlm
from llm2clip_plugin.vision.convert.layouts import (
    ParsedCheckpoint,
    layouts,
    lift_model_cfg,
    normalization,
)
from llm2clip_plugin.vision.convert.layouts.hub import (
    parse_hub,
    parse_timm_hub,
    refuse_language_model,
)
from llm2clip_plugin.vision.directory import (
    PREPROCESSOR_FILE,
    WEIGHT_SUFFIXES,
    WEIGHTS_FILE,
    DualConfig,
    fetch_directory,
    has_card,
    own_preprocessor,
    read_json,
    read_tensors,
    section,
    weight_files,
    write_json,
)
from llm2clip_plugin.vision.dual import DualEncoder, heads_state
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.towers import (
    TIMM_PREFIX,
    load_tower,
)


def main(argv: list[str]) -> int:
    """Import a checkpoint, print what was matched and what was ignored."""
    options = IMPORT.parse(argv)
    card, report = import_tower(
        options.source,
        options.output,
        config=options.config,
        image_size=options.image_size,
        part=options.part,
        replace=options.overwrite,
    )
    if old_size := card.training.get("resized_from"):
        sizes = f"from {old_size} to {card.image_size} px"
        if families()[card.family].positions:
            report.append(f"positions interpolated {sizes}")
        else:
            report.append(f"image size changed {sizes}; there is no position table")
    print("\n".join([*report, export.summary(options.output, card)]))
    return 0


def import_tower(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    part: str = "",
    replace: bool = False,
) -> tuple[TowerCard, list[str]]:
    """Write ``source`` (file, directory, Hub id or timm:NAME) as a tower directory; returns its
    card and a report.

    ``config``: a config.json (Hugging Face's, EVA-CLIP's or OpenCLIP's), or fields that override
    the source's own. ``image_size``, in pixels, interpolates the positions if it is not the
    source's own. ``part`` "vision": the source is a vision-language model, of which the tower is
    read. Raises FileNotFoundError, ValueError (architecture unknown), ContractError (an
    unknown, missing or misshapen tensor; code in a file).
    """
    path = Path(source).expanduser()
    if str(source).startswith(TIMM_PREFIX):
        if config is not None or part:
            raise ValueError(
                f"{source}: timm describes the architecture; remove --config and --part"
            )
        model = load_tower(source, image_size=image_size)
        imported_as = "timm"
        report = [f"layout timm: {len(model.state_dict())} tensors of the tower"]
    else:
        checkpoint = fetch_checkpoint(source, part)
        if has_card(checkpoint):
            if config is not None or part:
                raise ValueError(
                    f"{source} is a tower directory, which describes itself; remove --config and "
                    "--part"
                )
            card = export.reexport(
                checkpoint, output, image_size=image_size, replace=replace
            )
            return card, ["a tower directory"]
        passed_config = {} if config is None else read_json(Path(config))
        if part == PART:
            parsed, report = parse_vision_part(checkpoint, passed_config, image_size)
        else:
            parsed = parse_checkpoint(checkpoint, passed_config, image_size)
            report = parsed.report()
        with naming_full_disk(output):
            model = build_model(
                parsed,
                str(source),
                temporary=Path(output).resolve().parent,
                image_size=image_size,
            )
        imported_as = parsed.layout
    origin = path.name if path.exists() else str(source)
    card = export.export_tower(
        model,
        output,
        origin=origin,
        training={"imported_as": imported_as},
        replace=replace,
    )
    return card, report


def fetch_checkpoint(source: str | os.PathLike[str], part: str) -> Path:
    """The file or the folder of a checkpoint, downloaded if necessary; of a vision-language model's
    ``part`` no more than it needs. Raises FileNotFoundError."""
    if part == PART:
        return vlm.fetch_vision_part(source)
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.suffix in WEIGHT_SUFFIXES and not path.is_dir():
        problem = "is a pipe or a device" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{source} {problem}; expected a file of weights, a folder or a Hub id (owner/name)"
        )
    return fetch_directory(source)


def parse_vision_part(
    path: Path, passed_config: dict[str, Any], image_size: int | None
) -> tuple[ParsedCheckpoint, list[str]]:
    """The tower of a vision-language model, and a report. Raises as ``vlm.read_vision_part`` and
    ``parse_tensors``."""
    vision = vlm.read_vision_part(path, passed_config)
    parsed = parse_tensors(path, vision.state, vision.config, passed_config, image_size)
    return parsed, [vision.note, *parsed.report()]


def parse_checkpoint(
    path: Path, passed_config: dict[str, Any] | None, image_size: int | None = None
) -> ParsedCheckpoint:
    """Parse a checkpoint file or folder. ``passed_config``, the object of --config, overrides the
    folder's configuration file, or replaces it if it has a ``model_type``. Raises as
    ``parse_tensors``, and ValueError for a vision-language model."""
    state: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else weight_files(path):
        state |= read_tensors(file)
    passed_config = lift_model_cfg(passed_config or {})
    # its folder may hold Hugging Face's configuration, too
    names = ["config.json"]
    if any(key.startswith("visual.") for key in state):
        names.insert(0, "open_clip_config.json")
    files = [path / name for name in names if (path / name).is_file()]
    saved = read_json(files[0]) if files else {}
    if "model_type" in passed_config:
        config = passed_config
    else:
        config = merge(lift_model_cfg(saved), passed_config)
    refuse_language_model(path, state, config)
    return parse_tensors(path, state, config, passed_config, image_size)


def parse_tensors(
    path: Path,
    state: dict[str, Tensor],
    config: dict[str, Any],
    passed_config: dict[str, Any],
    image_size: int | None = None,
) -> ParsedCheckpoint:
    """Parse the tensors of a checkpoint file or folder with its configuration. Raises ValueError
    (unknown layout or architecture; NaFlex's most patches are no square, and no ``image_size``),
    ContractError (a missing, misshapen or unknown tensor)."""
    with errors_of_libraries(path):
        parsed = parse_layout(path, state, config)
    check_values(path, parsed)
    if "model_cfg" in config:
        parsed.preprocessor = normalization(section(config, "preprocess_cfg"))
    else:
        parsed.preprocessor = own_preprocessor(path)
    if "num_patches" in parsed.config:
        set_naflex_size(parsed, path, image_size)
    _check_text_side(parsed, passed_config)
    unused = sorted(parsed.state.keys() - parsed.used - parsed.left_out.keys())
    if unused:
        count = f"{len(unused)} of {len(parsed.state)} tensors"
        problem = f"{count} do not belong to a {parsed.layout} model: {unused[:10]}"
        raise ContractError(
            f"{path}: {problem}; a tensor was renamed, or --config must describe the architecture"
        )
    return parsed


def parse_layout(
    path: Path, state: dict[str, Tensor], config: dict[str, Any]
) -> ParsedCheckpoint:
    """The checkpoint as its layout reads it. Raises as ``parse_tensors``, and what transformers and
    torch raise about settings of the wrong type."""
    for layout in layouts().values():
        if layout.matches(state):
            parsed = layout.parse(state, config)
            parsed.layout = layout.name
            return parsed
    if "model_type" in config:
        return parse_hub(state, config)
    if "architecture" in config:
        return parse_timm_hub(state, config)
    names = ", ".join(sorted(state)[:3])
    names_of_layouts = ", ".join(layouts())
    problem = (
        f"the tensor names ({names}, ...) match no known layout ({names_of_layouts})"
    )
    raise ValueError(
        f"{path}: {problem}; "
        "a Hugging Face model needs its config.json, next to it or as --config"
    )


@contextmanager
def errors_of_libraries(path: Path) -> Iterator[None]:
    """As ``errors_about``, but a ValueError passes: it names the cause."""
    with errors_about(path, fix="download it again, or correct its config.json"):
        try:
            yield
        except ValueError as error:
            named = error  # raised below, where errors_about does not replace it
        else:
            return
    raise named


def check_values(path: Path, parsed: ParsedCheckpoint) -> None:
    """ContractError for weights of the tower that are quantized, or not finite, and for settings
    with more blocks than there are tensors."""
    for name, value in parsed.tower.items():
        if value.element_size() == 1 or value.is_complex():
            raise ContractError(
                f"{path}: {name} is {value.dtype}, as quantized weights are; import the model in "
                "half or full precision"
            )
        if not torch.isfinite(value).all():
            raise ContractError(
                f"{path}: {name} has values that are not finite; download it again, or take "
                "another checkpoint"
            )
    blocks = parsed.config.get("num_hidden_layers", 0)
    if blocks > len(parsed.tower):
        raise ContractError(
            f"{path}: config.json has num_hidden_layers {blocks}, but the tower has "
            f"{len(parsed.tower)} tensors; correct config.json"
        )


def set_naflex_size(
    parsed: ParsedCheckpoint, path: Path, image_size: int | None
) -> None:
    """Give a NaFlex the square of as many patches as its processor allows; ValueError if there is
    none, and no ``image_size``."""
    most = int(parsed.preprocessor.get("max_num_patches") or 0)
    if most == 0:
        return
    side = math.isqrt(most)
    size = side * parsed.config["patch_size"]
    parsed.config["image_size"] = size
    if side**2 != most and image_size is None:
        raise ValueError(
            f"{path / PREPROCESSOR_FILE}: max_num_patches {most} is not a square; set "
            f"--image-size, such as {size} px for {side**2} patches"
        )


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` overridden by ``above``, key by key in nested objects too."""
    nested = {
        key
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **{key: merge(below[key], above[key]) for key in nested}}


def _check_text_side(parsed: ParsedCheckpoint, passed_config: dict[str, Any]) -> None:
    """ContractError for an incomplete text side, unless --config states that the release has no
    logit scale (``logit_scale_init_value``) or no bias after the adapter
    (``text_cfg.proj_bias``)."""
    adapter = parsed.adapter
    if parsed.logit_scale is None and parsed.is_image_text:
        start = passed_config.get("logit_scale_init_value")
        if not isinstance(start, int | float):
            raise ContractError(
                "the checkpoint is missing logit_scale; if it never had one, pass --config with "
                'its initial logarithm, such as {"logit_scale_init_value": 2.6592}, CLIP\'s'
            )
        parsed.logit_scale = torch.tensor(float(start))
    if not adapter or "projection.bias" in adapter.names:
        return
    if section(passed_config, "text_cfg").get("proj_bias", True):
        bias = adapter.names["projection.weight"].replace("weight", "bias")
        raise ContractError(
            f"the checkpoint is missing {bias}; if it never had one, pass --config with "
            '{"text_cfg": {"proj_bias": false}}'
        )


def build_model(
    parsed: ParsedCheckpoint,
    source: str,
    *,
    temporary: Path,
    image_size: int | None = None,
) -> nn.Module:
    """A parsed checkpoint as a dual encoder, or as a tower alone; ``temporary``: folder for large
    files."""
    temporary.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=temporary, prefix=".import-") as name:
        folder = Path(name)
        write_json(folder / "config.json", parsed.config)
        write_json(folder / PREPROCESSOR_FILE, parsed.preprocessor)
        export.save_tensors(parsed.tower, folder / WEIGHTS_FILE)
        try:
            tower = load_tower(folder, image_size=image_size, title=source)
        except ContractError as error:
            raise ContractError(str(error).replace(name, source)) from error
    heads = (parsed.projection, parsed.adapter, parsed.logit_scale)
    if all(head is None for head in heads):
        return tower
    dual = DualEncoder(tower, heads_config(parsed, tower.config.hidden_size))
    state = heads_in(parsed)
    expected = heads_state(dual)
    # without a scale it keeps CLIP's initial value
    missing = sorted(expected.keys() - state.keys() - {"logit_scale"})
    wrong = sorted(
        name
        for name in state
        if name not in expected or state[name].shape != expected[name].shape
    )
    if missing or wrong:
        raise ContractError(
            f"{source}: missing tensors {missing}, unexpected or misshapen tensors {wrong}"
        )
    # the tower is loaded; the rest was just checked
    dual.load_state_dict(state, strict=False)
    return dual


def heads_config(parsed: ParsedCheckpoint, tower_width: int) -> DualConfig:
    """The dual encoder of a checkpoint: its adapter's configuration if it has one, with the
    projection, scale and bias that were found."""
    projection = parsed.projection
    scale = parsed.logit_scale
    bias = parsed.logit_bias
    if parsed.adapter is not None:
        config = parsed.adapter.config
    elif projection is not None:
        config = DualConfig(projection_dim=len(projection))
    else:
        config = DualConfig(projection_dim=tower_width)
    return dataclasses.replace(
        config,
        projection="none" if projection is None else "linear",
        projection_bias=parsed.projection_bias is not None,
        logit_scale_init=None if scale is None else float(scale),
        logit_bias_init=None if bias is None else float(bias),
    )


def heads_in(parsed: ParsedCheckpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint's heads under our names."""
    tensors = {
        "visual_projection.weight": parsed.projection,
        "visual_projection.bias": parsed.projection_bias,
        "logit_scale": parsed.logit_scale,
        "logit_bias": parsed.logit_bias,
    }
    state = {name: value for name, value in tensors.items() if value is not None}
    for name in ("logit_scale", "logit_bias"):
        if name in state:
            state[name] = state[name].reshape(1)
    if parsed.adapter is not None:
        for name, value in parsed.adapter.state.items():
            state[f"text_adapter.{name}"] = value
    return state
