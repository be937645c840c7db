"""A tower directory on disk: its files, where to get one, whether it is intact, how to publish it."""

import json
import os
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError, TowerCard, sha256_weights
from llm2clip_plugin.outside.timeouts import hub_snapshot

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "text_adapter.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"


def fetch_directory(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """A local directory for a path or a Hub id (``owner/name``), downloaded if necessary.

    Raises FileNotFoundError if the source is neither, or if the Hub cannot provide it.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file, not a tower directory; convert it with `llm2clip import`")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is not a file, a directory or a Hub id (owner/name)")
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
        raise FileNotFoundError(f"no {path.name} in {path.parent}; create a tower directory with `llm2clip import`")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ContractError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ContractError(f"{path} contains a {type(body).__name__}, expected a JSON object")
    return body


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Indented, keys sorted."""
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_card(directory: Path) -> TowerCard:
    """The card of a tower directory, after comparing its hashes with the files; ContractError names both hashes."""
    card = TowerCard.read(directory / TowerCard.FILE)
    for file, expected in ((WEIGHTS_FILE, card.weights_sha256), (ADAPTER_FILE, card.adapter_sha256)):
        if expected and (actual := sha256_weights(directory / file)) != expected:
            raise ContractError(
                f"{directory / file} has SHA-256 {actual}, but {TowerCard.FILE} records {expected}; "
                "export or copy the tower again"
            )
    return card


def push_to_hub(directory: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a tower directory to the Hub as ``owner/name``; returns the URL of the commit.

    Raises ContractError if the weights don't match the card, OSError if the Hub rejects the upload.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    card = check_card(directory)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    message = f"LLM2CLIP {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256[:12]}"
    return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message=message).commit_url)
