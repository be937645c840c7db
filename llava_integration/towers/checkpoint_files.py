"""Whether a LLaVA checkpoint is complete, found out before a model is loaded: seconds instead of minutes, one error."""

import json
from pathlib import Path
from typing import Any

from llava_integration.towers.names import HUB_ID
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.safetensors_header import read_header
from llm2clip_plugin.outside.values import read_json_value

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.json")
FIX = "copy the checkpoint again"


def check_checkpoint(path: str, base: str | None = None) -> None:
    """Compare a checkpoint's folder with what LLaVA will read of it; ids of the Hub are left to LLaVA.

    ``base``: the base model that is given with it. Raises FileNotFoundError or ContractError with the file.
    """
    for option, name in (("--model-path", path), ("--model-base", base)):
        if name and not Path(name).expanduser().is_dir() and not HUB_ID.match(name):
            raise FileNotFoundError(f"{option} {name} is neither a folder nor a Hub id; expected a LLaVA checkpoint")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{path} is not a LLaVA checkpoint: no {CONFIG} in it")
    _check_config(folder / CONFIG)
    _check_weights(folder)
    if not base and not any((folder / name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(f"{path} has no tokenizer ({' or '.join(TOKENIZERS[:2])}); {FIX}")


def _check_config(path: Path) -> None:
    config = read_json_value(path)
    if not isinstance(config, dict):
        raise ContractError(f"{path} contains a {type(config).__name__}, expected an object; {FIX}")
    fields: dict[str, type] = {"mm_vision_tower": str, "mm_vision_select_layer": int}
    for name, kind in fields.items():
        value: Any = config.get(name)
        if name in config and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ContractError(f"{path}: {name} is {value!r}, expected {kind.__name__}; {FIX}")


def _check_weights(folder: Path) -> None:
    """Every file that an index lists is there, and the headers of safetensors files fit their sizes."""
    files = {path.name: path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))}
    for index in sorted(folder.glob("*.index.json")):
        listed = read_json_value(index)
        names = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(names, dict):
            raise ContractError(f"{index}: weight_map is {json.dumps(names)[:60]}, expected an object; {FIX}")
        if missing := sorted({str(name) for name in names.values()} - files.keys()):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, listed in {index.name}; {FIX}")
    if not files:
        raise FileNotFoundError(f"{folder} has no weights ({' or '.join(WEIGHTS)}); {FIX}")
    for path in files.values():
        if path.suffix == ".safetensors":
            read_header(path, fix=FIX)
