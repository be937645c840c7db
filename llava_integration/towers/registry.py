"""The towers that a user knows by name, and the chosen one.

One JSON file, ``$LLM2CLIP_HOME/towers.json``, by default in ``$XDG_CONFIG_HOME/llm2clip`` or
``~/.config/llm2clip``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from llm2clip_plugin.contracts import VersionedRecord


@dataclass(frozen=True, kw_only=True)
class Registry(VersionedRecord):
    """``towers.json``: what `llm2clip towers` lists."""

    KIND: ClassVar[str] = "llm2clip-towers"
    FILE: ClassVar[str] = "towers.json"

    chosen: str = ""  # key of towers; "" before the first `llm2clip use`
    towers: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> {"spec", "weights_sha256"}

    def summary(self) -> str:
        """What is known, for the end of an error message."""
        if not self.towers:
            return f"`llm2clip towers` knows none ({registry_file()})"
        return "known towers: " + ", ".join(f"{name} ({entry['spec']})" for name, entry in sorted(self.towers.items()))


def registry_file() -> Path:
    """Where the registry lies; the file need not exist."""
    home = os.environ.get("LLM2CLIP_HOME")
    if home:
        return Path(home).expanduser() / Registry.FILE
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "llm2clip" / Registry.FILE


def read() -> Registry:
    """The registry; an empty one before the first entry."""
    path = registry_file()
    return Registry.read(path) if path.is_file() else Registry()


def remember(spec: str, weights_sha256: str, *, choose: bool, name: str = "") -> str:
    """Enter a tower (``spec`` = absolute path or Hub id) and return the name under which it is known."""
    known = read()
    name = name or next((name for name, entry in known.towers.items() if entry["spec"] == spec), "")
    name = name or free_name(spec, known)
    towers = {**known.towers, name: {"spec": spec, "weights_sha256": weights_sha256}}
    replace(known, chosen=name if choose or not known.chosen else known.chosen, towers=towers).write(registry_file())
    return name


def free_name(spec: str, known: Registry) -> str:
    """The last part of ``spec``, numbered if another tower has it already."""
    stem = spec.partition("@")[0].rstrip("/").rpartition("/")[2]
    return next(
        name
        for number in range(1, len(known.towers) + 2)
        if (name := stem if number == 1 else f"{stem}-{number}") not in known.towers
    )


def forget(name: str) -> None:
    """Drop an entry; ValueError lists the known ones if there is none of that name."""
    known = read()
    if name not in known.towers:
        raise ValueError(f"no tower is known as {name!r}; {known.summary()}")
    towers = {key: entry for key, entry in known.towers.items() if key != name}
    replace(known, chosen="" if known.chosen == name else known.chosen, towers=towers).write(registry_file())
