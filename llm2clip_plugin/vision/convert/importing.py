"""Turn vision checkpoints into tower directories.

| checkpoint                                   | recognized by                    | layouts/     |
|----------------------------------------------|----------------------------------|--------------|
| LLM2CLIP-EVA02-*.pt, EVA-CLIP                | visual.blocks.*                  | eva_clip.py  |
| OpenCLIP CLIP                                | visual.transformer.resblocks.*   | open_clip.py |
| OpenVision                                   | no visual.ln_pre                 | open_clip.py |
| OpenCLIP, towers of timm (PE, SigLIP, EVA02) | visual.trunk.*                   | open_clip.py |
| timm's own, on the Hub                       | config.json with an architecture | hub.py       |
| InternViT, by OpenGVLab's own code           | encoder.layers.*.ls1             | intern_vit.py |
| Qwen3-VL, Qwen3.5                            | model.visual.pos_embed           | hub.py       |
| Hugging Face, LLM2CLIP-Openai-*, *-siglip2-* | config.json with a model_type    | hub.py       |
"""

import dataclasses
import importlib.util
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.atomic import naming_full_disk
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.folders import CONVERTED_FOLDER, output_folder
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.safetensors_header import load_tensors
from llm2clip_plugin.vision import export
from llm2clip_plugin.vision.convert import IMPORT
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
    WEIGHTS_FILE,
    DualConfig,
    fetch_directory,
    own_preprocessor,
    read_json,
    read_tensors,
    section,
    weight_files,
    write_json,
)
from llm2clip_plugin.vision.dual import DualEncoder, heads_state
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.parts import tower_in
from llm2clip_plugin.vision.towers import TIMM_PREFIX, load_tower, preprocessor_config


def main(argv: list[str]) -> int:
    """Import a checkpoint, print what was matched and what was ignored."""
    options = IMPORT.parse(argv)
    card, report = import_tower(
        options.source,
        options.output,
        config=options.config,
        image_size=options.image_size,
        replace=options.overwrite,
    )
    if old_size := card.training.get("resized_from"):
        report.append(f"positions interpolated from {old_size} to {card.image_size} px")
    print("\n".join([*report, export.summary(options.output, card)]))
    return 0


def import_tower(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    replace: bool = False,
) -> tuple[TowerCard, list[str]]:
    """Write ``source`` (file, directory, Hub id or timm:NAME) as a tower directory; returns its
    card and a report.

    ``config``: a config.json (Hugging Face's, EVA-CLIP's or OpenCLIP's), or fields that override
    the source's own. ``image_size``, in pixels, interpolates the positions if it is not the
    source's own. Raises FileNotFoundError, ValueError (architecture unknown), ContractError (an
    unknown, missing or misshapen tensor; code in a file).
    """
    path = Path(source).expanduser()
    if str(source).startswith(TIMM_PREFIX):
        if config is not None:
            raise ValueError(
                f"{source}: timm describes the architecture; remove --config"
            )
        model = load_tower(source, image_size=image_size)
        imported_as = "timm"
        report = [f"layout timm: {len(model.state_dict())} tensors of the tower"]
    else:
        checkpoint = path if path.is_file() else fetch_directory(source)
        if checkpoint.is_dir() and (checkpoint / TowerCard.FILE).is_file():
            card = export.reexport(
                checkpoint, output, image_size=image_size, replace=replace
            )
            return card, ["a tower directory"]
        passed_config = None if config is None else read_json(Path(config))
        parsed = parse_checkpoint(checkpoint, passed_config, image_size)
        with naming_full_disk(output):
            model = build_model(
                parsed,
                str(source),
                temporary=Path(output).resolve().parent,
                image_size=image_size,
            )
        imported_as = parsed.layout
        report = parsed.report()
    origin = path.name if path.exists() else str(source)
    card = export.export_tower(
        model,
        output,
        origin=origin,
        training={"imported_as": imported_as},
        replace=replace,
    )
    return card, report


def parse_checkpoint(
    path: Path, passed_config: dict[str, Any] | None, image_size: int | None = None
) -> ParsedCheckpoint:
    """Parse a checkpoint file or folder. ``given``, the object of --config, overrides the folder's
    configuration file, or replaces it if it has a ``model_type``. Raises ValueError (unknown layout
    or architecture; NaFlex's most patches are no square, and no ``image_size``), ContractError (a
    missing, misshapen or unknown tensor)."""
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
    config = (
        passed_config
        if "model_type" in passed_config
        else merge(lift_model_cfg(saved), passed_config)
    )
    refuse_language_model(path, state, config)
    layout = next(
        (layout for layout in layouts().values() if layout.matches(state)), None
    )
    if layout is not None:
        parsed = layout.parse(state, config)
        parsed.layout = layout.name
    elif "model_type" in config:
        parsed = parse_hub(state, config)
    elif "architecture" in config:
        parsed = parse_timm_hub(state, config)
    else:
        names = ", ".join(sorted(state)[:3])
        names_of_layouts = ", ".join(layouts())
        problem = f"the tensor names ({names}, ...) match no known layout ({names_of_layouts})"
        raise ValueError(
            f"{path}: {problem}; "
            "a Hugging Face model needs its config.json, next to it or as --config"
        )
    if "model_cfg" in config:
        parsed.preprocessor = normalization(section(config, "preprocess_cfg"))
    else:
        parsed.preprocessor = own_preprocessor(path)
    is_naflex = "num_patches" in parsed.config
    if is_naflex and (most := int(parsed.preprocessor.get("max_num_patches") or 0)):
        side = math.isqrt(most)
        size = side * parsed.config["patch_size"]
        parsed.config["image_size"] = size
        if side**2 != most and image_size is None:
            problem = (
                f"{path / PREPROCESSOR_FILE}: max_num_patches {most} is not a square"
            )
            advice = f"set --image-size, such as {size} px for {side**2} patches"
            raise ValueError(f"{problem}; {advice}")
    _check_text_side(parsed, passed_config)
    if unused := sorted(parsed.state.keys() - parsed.used - parsed.left_out.keys()):
        count = f"{len(unused)} of {len(parsed.state)} tensors"
        problem = f"{count} do not belong to a {parsed.layout} model: {unused[:10]}"
        raise ContractError(
            f"{path}: {problem}; a tensor was renamed, or --config must describe the architecture"
        )
    return parsed


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` overridden by ``above``, key by key in nested objects too."""
    nested = {
        key
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **{key: merge(below[key], above[key]) for key in nested}}


def _check_text_side(parsed: ParsedCheckpoint, passed_config: dict[str, Any]) -> None:
    """ContractError for an incomplete text side, unless --config (``given``) states that the
    release has no logit scale (``logit_scale_init_value``) or no bias after the adapter
    (``text_cfg.proj_bias``)."""
    adapter = parsed.adapter
    if parsed.logit_scale is None and parsed.is_image_text:
        if not isinstance(
            start := passed_config.get("logit_scale_init_value"), int | float
        ):
            example = '{"logit_scale_init_value": 2.6592}'
            advice = (
                f"pass --config with its initial logarithm, such as {example}, CLIP's"
            )
            raise ContractError(
                f"the checkpoint is missing logit_scale; if it never had one, {advice}"
            )
        parsed.logit_scale = torch.tensor(float(start))
    if (
        adapter
        and "projection.bias" not in adapter.names
        and section(passed_config, "text_cfg").get("proj_bias", True)
    ):
        bias = adapter.names["projection.weight"].replace("weight", "bias")
        advice = (
            'if it never had one, pass --config with {"text_cfg": {"proj_bias": false}}'
        )
        raise ContractError(f"the checkpoint is missing {bias}; {advice}")


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
            tower = load_tower(folder, image_size=image_size)
        except ContractError as error:
            raise ContractError(str(error).replace(name, source)) from error
    if (
        parsed.projection is None
        and parsed.adapter is None
        and parsed.logit_scale is None
    ):
        return tower
    width = (
        tower.config.hidden_size
        if parsed.projection is None
        else len(parsed.projection)
    )
    config = dataclasses.replace(
        DualConfig(projection_dim=width)
        if parsed.adapter is None
        else parsed.adapter.config,
        projection="none" if parsed.projection is None else "linear",
        projection_bias=parsed.projection_bias is not None,
        logit_scale_init=None
        if parsed.logit_scale is None
        else float(parsed.logit_scale),
        logit_bias_init=None if parsed.logit_bias is None else float(parsed.logit_bias),
    )
    dual = DualEncoder(tower, config)
    state = {
        "visual_projection.weight": parsed.projection,
        "visual_projection.bias": parsed.projection_bias,
        "logit_scale": None
        if parsed.logit_scale is None
        else parsed.logit_scale.reshape(1),
        "logit_bias": None
        if parsed.logit_bias is None
        else parsed.logit_bias.reshape(1),
    }
    if parsed.adapter is not None:
        state |= {
            f"text_adapter.{name}": value
            for name, value in parsed.adapter.state.items()
        }
    state = {name: value for name, value in state.items() if value is not None}
    expected = heads_state(dual)
    # which then keeps CLIP's initial value
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
    dual.load_state_dict(
        state, strict=False
    )  # the tower is loaded; the rest was just checked
    return dual


# Convert a tower directory to another library's format; each reloads what it wrote and compares the
# features.

ONNX_FILE = "image_encoder.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# bytes of weights; protobuf is limited to 2 GiB, larger weights are written to a separate file
LARGEST_ONNX = 1 << 30


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format_name: str,
    *,
    replace: bool = False,
) -> Path:
    """Write the tower directory ``source`` to ``output`` in another format; returns the directory.
    Raises ValueError if the format cannot represent the tower, ContractError if the files give
    other features."""
    directory = fetch_directory(source)
    model = export.load_model(directory)
    write = {"clip": write_clip, "onnx": write_onnx}[format_name]
    with output_folder(output, CONVERTED_FOLDER, replace=replace) as temporary:
        write(model.eval(), temporary, preprocessor_config(directory, square=True))
    return Path(output)


def write_clip(dual: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """A CLIP tower with a single projection matrix, as a CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionModelWithProjection

    if not isinstance(dual, DualEncoder) or family_of(dual.tower).name != "clip":
        raise ValueError(
            "format 'clip' is for a CLIP tower with a projection; --format onnx converts every "
            "tower"
        )
    chosen = {
        name: getattr(dual.config, name)
        for name in ("pool", "projection", "projection_norm", "projection_bias")
    }
    pool, *projection = chosen.values()
    if pool not in ("pooled", "cls") or projection != ["linear", False, False]:
        raise ValueError(
            f"format 'clip' cannot represent a tower with {chosen}; --format onnx can"
        )
    export.save_tower(dual.tower, directory)
    heads = {"visual_projection.weight": dual.visual_projection.weight}
    export.save_tensors(
        load_tensors(directory / WEIGHTS_FILE) | heads, directory / WEIGHTS_FILE
    )
    fields = {
        "projection_dim": dual.config.projection_dim,
        "architectures": ["CLIPVisionModelWithProjection"],
    }
    write_json(directory / "config.json", read_json(directory / "config.json") | fields)
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
    with quiet_transformers():
        reloaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            directory, torch_dtype=dual.tower.dtype
        ).eval()
    pixels = export.probe_images(dual.tower)
    with torch.no_grad():
        features = F.normalize(
            reloaded(pixel_values=pixels).image_embeds.float(), dim=-1
        )
        export.compare_features(
            {"image": dual.encode_image(pixels)},
            {"image": features},
            where="format 'clip'",
        )


class _ImageEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        is_dual = isinstance(self.model, DualEncoder)
        return (
            self.model.encode_image(pixel_values)
            if is_dual
            else self.model(pixel_values).pooler_output
        )


def write_onnx(model: nn.Module, directory: Path, preprocessor: dict[str, Any]) -> None:
    """The image encoder for ONNX Runtime, for any batch size: image features, or the pooled output
    of a tower alone."""
    if missing := [
        name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None
    ]:
        raise ValueError(
            f"format 'onnx' requires {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    import onnxruntime

    encoder = _ImageEncoder(model).float().eval()
    pixels = export.probe_images(tower_in(model), count=3)
    size = sum(parameter.numel() * 4 for parameter in encoder.parameters())
    with warnings.catch_warnings():  # of a renamed class of torch's own
        warnings.filterwarnings(
            "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
        )
        torch.onnx.export(
            encoder,
            (pixels[:2],),
            str(directory / ONNX_FILE),
            input_names=["pixel_values"],
            output_names=["image_features"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            external_data=size > LARGEST_ONNX,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(
        str(directory / ONNX_FILE), providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        for batch in (pixels, pixels[:1]):
            features = torch.from_numpy(
                session.run(None, {"pixel_values": batch.numpy()})[0]
            )
            export.compare_features(
                {"image": encoder(batch)}, {"image": features}, where="ONNX Runtime"
            )
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
