"""The configuration of a checkpoint: what lies beside it, and what the user says over that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.towers import PREPROCESSOR_FILE, read_json


def config_beside(place: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration that lies in a folder with these tensors; {} if there is none.

    Some repositories hold a model twice, as OpenCLIP's and as Hugging Face's, each with its file.
    """
    names = ("open_clip_config.json", "config.json") if any(key.startswith("visual.") for key in state) else ()
    found = [place / name for name in (*names, "config.json") if place.is_dir() and (place / name).is_file()]
    return read_json(found[0]) if found else {}


def preprocessor_beside(place: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation as OpenCLIP's ``preprocess_cfg`` has them, else the folder's preprocessor_config.json."""
    if "model_cfg" in config:
        chosen = section(config, "preprocess_cfg")
        return {f"image_{key}": chosen[key] for key in ("mean", "std") if key in chosen}
    file = place / PREPROCESSOR_FILE
    return read_json(file) if place.is_dir() and file.is_file() else {}


def opened(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of ``model_cfg``, where OpenCLIP's file on the hub has them, at its top."""
    return {**config, **section(config, "model_cfg")}


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``above`` over it, inside objects too."""
    inside = {key for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: over(below[key], above[key]) for key in inside}}


def section(config: dict[str, Any], name: str, *, where: str = "config.json") -> dict[str, Any]:
    """An object inside a JSON object, {} if it is absent or null; ContractError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ContractError(f'{where}: "{name}" is {value!r}, expected an object')
    return value or {}
