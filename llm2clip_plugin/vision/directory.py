"""A tower directory on disk: its files, where to get one, its hashes, and the places that its card names."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import TowerCard, sha256_weights
from llm2clip_plugin.files import ContractError, can_only_be_a_path, hub_snapshot, read_json_value

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "text_adapter.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
CONFIG_FILE = "config.json"


def fetch_directory(source: str | os.PathLike[str], *, revision: str | None = None, also: tuple[str, ...] = ()) -> Path:
    """A local directory for a path or a Hub id (``owner/name``), downloaded if necessary. Raises FileNotFoundError.

    ``also``: patterns of files that are downloaded beside configurations and weights.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.exists() or can_only_be_a_path(name) or "/" not in name:
        raise FileNotFoundError(f"{name} is not a directory or a Hub id (owner/name)")
    try:
        directory = hub_snapshot(name, revision=revision, patterns=["*.json", "*.safetensors", *also])
        if not any(directory.glob("*.safetensors")):
            directory = hub_snapshot(name, revision=revision, patterns=["*.json", "*.bin", "*.pt", *also])
    except (OSError, ValueError) as error:  # huggingface_hub's errors are OSError (network, missing) or ValueError
        raise FileNotFoundError(f"{name} is not a directory and cannot be downloaded from the Hub: {error}") from error
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ContractError names the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; create a tower directory with `llm2clip import CHECKPOINT --output DIR`"
        )
    body = read_json_value(path)
    if not isinstance(body, dict):
        raise ContractError(f"{path} contains a {type(body).__name__}, expected a JSON object")
    return body


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Indented, keys sorted."""
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Whether a tower directory is what was written: the hashes of its weights.

REMEDY = "the directory was modified or only partly copied; copy or export the tower again"


def has_card(directory: Path) -> bool:
    """Whether a directory is a tower directory of this package, not just a Hugging Face model."""
    return (directory / TowerCard.FILE).is_file()


def check_hash(directory: Path, file: str) -> None:
    """Compare the weights or the adapter of a directory that has a card with the hash in it; ContractError has both."""
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


# The places that a card names: origin, teacher and its adapter. A relative path in a card starts with ./ or ../, so it
# is never mistaken for a Hub id, and stays right when a folder with the tower and its teacher is moved.

TEACHER_ADAPTER = "teacher-adapter"  # folder in a tower directory: the adapter of its teacher, if it is portable
TEACHER_PLACES = ("llm", "adapter")  # fields of a TeacherIdentity


def is_local(place: str) -> bool:
    """Whether a place is a path of this machine, rather than a Hub id or the name of a model in a library."""
    return place.startswith(("/", "~", "./", "../")) or place in (".", "..") or os.path.exists(place)


def recorded(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card as it is written into ``folder``: local paths made relative to it, absolute where only / is shared."""
    inside = Path(folder).expanduser().absolute()

    def relative(place: str) -> str:
        path = Path(place).expanduser().absolute()
        if not is_local(place) or os.path.commonpath([path, inside]) == path.anchor:
            return str(path) if is_local(place) else place
        shown = os.path.relpath(path, inside)
        return shown if shown.startswith("..") else f"./{shown}"

    return _with_places(card, relative)


def located(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card that was read from ``folder``, its relative paths made absolute."""
    inside = Path(folder).expanduser().absolute()
    return _with_places(card, lambda p: os.path.normpath(inside / p) if p.startswith(("./", "../")) else p)


def published(card: TowerCard) -> TowerCard:
    """The card without local paths: only the name of a folder is left of the weights', nothing of an adapter's that is
    not in the directory."""

    def is_private(place: str) -> bool:
        return is_local(place) and place != f"./{TEACHER_ADAPTER}"

    named = _with_places(card, lambda place: Path(place).expanduser().absolute().name if is_private(place) else place)
    if is_private(str(card.teacher.get("adapter", ""))):
        del named.teacher["adapter"]  # a copy of the card's
    return named


def _with_places(card: TowerCard, change: Callable[[str], str]) -> TowerCard:
    """The card with ``change`` applied to each place in it; "" stays."""
    places = {name: value for name in TEACHER_PLACES if isinstance(value := card.teacher.get(name), str) and value}
    teacher = card.teacher | {name: change(place) for name, place in places.items()}
    return dataclasses.replace(card, origin=change(card.origin) if card.origin else "", teacher=teacher)
