"""The configuration of a checkpoint: the file next to it, with the user's --config on top."""

from pathlib import Path
from typing import Any

from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.directory import read_json
from llm2clip_plugin.vision.family import RESAMPLE
from llm2clip_plugin.vision.preprocessor import own_preprocessor


def config_in(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration file in the folder of a checkpoint; {} without one.

    Some repositories contain a model twice, in OpenCLIP's and in Hugging Face's layout, each with its own file.
    """
    is_open_clip = any(key.startswith("visual.") for key in state)
    names = ("open_clip_config.json", "config.json") if is_open_clip else ("config.json",)
    files = [path / name for name in names if (path / name).is_file()]
    return read_json(files[0]) if files else {}


def preprocessor_in(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Mean, deviation, filter of OpenCLIP's ``preprocess_cfg``, else of the folder's preprocessor_config.json."""
    if "model_cfg" not in config:
        return own_preprocessor(path)
    values = section(config, "preprocess_cfg")
    own = {f"image_{key}": values[key] for key in ("mean", "std") if key in values}
    if values.get("interpolation") in RESAMPLE:
        own["resample"] = RESAMPLE[values["interpolation"]]
    return own


def lift_model_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of ``model_cfg``, where OpenCLIP's files on the Hub nest them, at the top."""
    return {**config, **section(config, "model_cfg")}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` overridden by ``above``, key by key in nested objects too."""
    nested = {key for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: merge(below[key], above[key]) for key in nested}}


def section(config: dict[str, Any], name: str, *, where: str = "config.json") -> dict[str, Any]:
    """An object inside a JSON object, {} if it is absent or null; ContractError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ContractError(f'{where}: "{name}" is {value!r}, expected an object')
    return value or {}


def vision_fields(config: Any) -> dict[str, Any]:
    """OpenCLIP's ``vision_cfg`` for the configuration of a CLIP or EVA-CLIP tower."""
    return {
        "image_size": config.image_size,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "patch_size": config.patch_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
    }
