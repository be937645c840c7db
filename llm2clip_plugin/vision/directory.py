"""A tower directory on disk: its files, and where to get one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import TowerCard, sha256_weights
from llm2clip_plugin.files import ContractError, can_only_be_a_path, hub_snapshot

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


# Whether a tower directory is what was written: its card against its config.json, and the hashes of its weights.

CARD_OF_CONFIG = {  # field of the card -> field of config.json
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
REMEDY = "the directory was modified or only partly copied; copy or export the tower again"


def has_card(directory: Path) -> bool:
    """Whether a directory is a tower directory of this package, not just a Hugging Face model."""
    return (directory / TowerCard.FILE).is_file()


def check_description(directory: Path, family: str, config: Mapping[str, Any], *, has_cls: bool) -> None:
    """Compare a tower directory's card, if it has one, with its configuration; ContractError has both values.

    family, has_cls: what ``model_type`` in config.json stands for; config: its fields.
    """
    if not has_card(directory):
        return
    card = TowerCard.read(directory / TowerCard.FILE)
    pairs = {name: (getattr(card, name), config.get(other)) for name, other in CARD_OF_CONFIG.items()}
    pairs |= {"family": (card.family, family), "has_cls": (card.has_cls, has_cls)}
    if different := [f"{name} is {ours!r}, not {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]:
        raise ContractError(
            f"{directory / TowerCard.FILE} does not describe the tower in {CONFIG_FILE}: {'; '.join(different)}; "
            f"{REMEDY}"
        )


def check_hash(directory: Path, file: str) -> None:
    """Compare the weights or the adapter of a directory that has a card with the hash in it.

    Raises ContractError with both hashes, FileNotFoundError without the file.
    """
    if not has_card(directory):
        return
    card = TowerCard.read(directory / TowerCard.FILE)
    expected = card.weights_sha256 if file == WEIGHTS_FILE else card.adapter_sha256
    if not (directory / file).is_file():
        raise FileNotFoundError(f"no {file} in {directory}; {REMEDY}")
    if (actual := sha256_weights(directory / file)) != expected:
        raise ContractError(f"{directory / file} has SHA-256 {actual}, but {card.FILE} records {expected!r}: {REMEDY}")


def check_card(directory: Path, *, adapter: bool = True) -> TowerCard:
    """The card of a tower directory, after comparing the files that it has hashes of.

    ``adapter`` False: LLaVA uses the tower alone, whose directory may lack the text adapter.
    """
    card = TowerCard.read(directory / TowerCard.FILE)
    check_hash(directory, WEIGHTS_FILE)
    if card.projection_dim and adapter:
        check_hash(directory, ADAPTER_FILE)
    return card
