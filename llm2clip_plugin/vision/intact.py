"""Whether a tower directory is what was written: its card against its config.json, and the hashes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError, TowerCard, sha256_weights
from llm2clip_plugin.vision.directory import ADAPTER_FILE, CONFIG_FILE, WEIGHTS_FILE

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
