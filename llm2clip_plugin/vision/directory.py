"""A tower directory on disk: its files, and where to get one."""

import json
import os
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.timeouts import can_only_be_a_path, hub_snapshot

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "text_adapter.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
CONFIG_FILE = "config.json"


def fetch_directory(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """A local directory for a path or a Hub id (``owner/name``), downloaded if necessary.

    Raises FileNotFoundError if the source is neither, or if the Hub cannot provide it.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.exists() or can_only_be_a_path(name) or "/" not in name:
        raise FileNotFoundError(f"{name} is not a directory or a Hub id (owner/name)")
    try:
        directory = hub_snapshot(name, revision=revision, patterns=["*.json", "*.safetensors"])
        if not any(directory.glob("*.safetensors")):
            directory = hub_snapshot(name, revision=revision, patterns=["*.json", "*.bin", "*.pt"])
    except (OSError, ValueError) as error:  # huggingface_hub's errors are OSError (network, missing) or ValueError
        raise FileNotFoundError(f"{name} is not a directory and cannot be downloaded from the Hub: {error}") from error
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ContractError names the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; create a tower directory with `llm2clip import CHECKPOINT --output DIR`"
        )
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ContractError(f"{path} contains a {type(body).__name__}, expected a JSON object")
    return body


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Indented, keys sorted."""
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
