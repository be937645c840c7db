"""Whether a LLaVA checkpoint is complete, found out before a model is loaded: seconds instead of minutes, one error."""

from pathlib import Path
from typing import Any

from llava_integration.towers.names import HUB_ID
from llm2clip_plugin.outside.safetensors_header import read_header
from llm2clip_plugin.vision.directory import read_json

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.json")
FIX = "copy the checkpoint again"


def checkpoint_config(folder: Path) -> dict[str, Any]:
    """config.json of a LLaVA checkpoint. Raises FileNotFoundError without one, ContractError for a damaged one."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not a LLaVA checkpoint: no {CONFIG} in it")
    return read_json(folder / CONFIG)


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
    checkpoint_config(folder)
    files = {file.name: file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")}
    if not files:
        raise FileNotFoundError(f"{folder} has no weights (.safetensors or .bin); {FIX}")
    for index in sorted(folder.glob("*.index.json")):
        if missing := sorted({*read_json(index).get("weight_map", {}).values()} - files.keys()):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, listed in {index.name}; {FIX}")
    for file in files.values():
        if file.suffix == ".safetensors":
            read_header(file, fix=FIX)
    if not base and not any((folder / name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(f"{path} has no tokenizer ({' or '.join(TOKENIZERS[:2])}); {FIX}")
