"""Where a tower's card says that weights are: a Hub id, or a local path, relative to the tower's folder if possible.

A relative path starts with ``./`` or ``../``, so it is never mistaken for a Hub id. It stays right when a folder with
the tower and its teacher is moved, and does not tell where that folder was. ``published`` has no local path at all.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import TowerCard

TEACHER_ADAPTER = "teacher-adapter"  # folder in a tower directory: the adapter of its teacher, if it is portable
TEACHER_PLACES = ("llm", "adapter")  # fields of a TeacherIdentity


def is_local(place: str) -> bool:
    """Whether a place is a path of this machine, rather than a Hub id or the name of a model in a library."""
    return place.startswith(("/", "~", "./", "../")) or place in (".", "..") or os.path.exists(place)


def recorded(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card as it is written into ``folder``: local paths made relative to it, absolute where only / is shared."""
    return _replaced(card, lambda place: _relative(place, Path(folder)) if is_local(place) else place)


def located(card: TowerCard, folder: str | os.PathLike[str]) -> TowerCard:
    """The card that was read from ``folder``, its relative paths made absolute."""
    return _replaced(card, lambda place: _absolute(place, Path(folder)))


def published(card: TowerCard) -> TowerCard:
    """The card without local paths: only the name of a folder is left of the weights', nothing of an adapter's that is
    not in the directory."""

    def is_private(place: str) -> bool:
        return is_local(place) and place != f"./{TEACHER_ADAPTER}"

    named = _replaced(card, lambda place: Path(place).expanduser().absolute().name if is_private(place) else place)
    if is_private(str(card.teacher.get("adapter", ""))):
        del named.teacher["adapter"]  # a copy of the card's
    return named


def _replaced(card: TowerCard, change: Callable[[str], str]) -> TowerCard:
    """The card with ``change`` applied to each place in it; "" stays."""

    def changed(place: Any) -> Any:
        return change(place) if isinstance(place, str) and place else place

    teacher = {name: changed(value) if name in TEACHER_PLACES else value for name, value in card.teacher.items()}
    return dataclasses.replace(card, origin=changed(card.origin), teacher=teacher)


def _relative(place: str, folder: Path) -> str:
    path, folder = Path(place).expanduser().absolute(), folder.expanduser().absolute()
    if os.path.commonpath([path, folder]) == path.anchor:
        return str(path)
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _absolute(place: str, folder: Path) -> str:
    """``place``, from the folder if it is relative to it."""
    if not place.startswith(("./", "../")):
        return place
    return os.path.normpath(folder.expanduser().absolute() / place)
