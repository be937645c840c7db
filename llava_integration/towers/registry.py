"""The towers that the user registered by name, and the selected one.

One JSON file: ``$LLM2CLIP_HOME/towers.json``, else ``$XDG_CONFIG_HOME/llm2clip/towers.json``, else
``~/.config/llm2clip/towers.json``.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from llm2clip_plugin.contracts import ContractError, VersionedRecord


@dataclass(frozen=True, kw_only=True)
class Registry(VersionedRecord):
    """The contents of ``towers.json``."""

    KIND: ClassVar[str] = "llm2clip-towers"
    FILE: ClassVar[str] = "towers.json"

    chosen: str = ""  # key of towers; "" before the first `llm2clip use`
    towers: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> {"spec", "weights_sha256"}

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for an entry without its two fields, or a selected tower that is not registered."""
        for name, entry in self.towers.items():
            if missing := [key for key in ("spec", "weights_sha256") if not entry.get(key)]:
                raise ContractError(f"{where}: tower {name!r} has no {' and no '.join(missing)}")
        if self.chosen and self.chosen not in self.towers:
            raise ContractError(f"{where}: chosen is {self.chosen!r}, which is not one of {sorted(self.towers)}")

    def summary(self) -> str:
        """The registered towers in one line, for error messages."""
        if not self.towers:
            return f"no towers are registered in {registry_file()}"
        return "registered towers: " + ", ".join(
            f"{name} ({entry['spec']})" for name, entry in sorted(self.towers.items())
        )


def registry_file() -> Path:
    """Path of the registry; the file need not exist."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.environ.get("LLM2CLIP_HOME") or f"{config}/llm2clip").expanduser() / Registry.FILE


def read() -> Registry:
    """The registry, empty if there is no file. Raises ContractError for a damaged file."""
    path = registry_file()
    return Registry.read(path) if path.is_file() else Registry()


def select(spec: str, weights_sha256: str, *, name: str = "") -> str:
    """Register a tower (``spec``: absolute path or Hub id), select it and return its name."""
    known = read()
    name = name or next((name for name, entry in known.towers.items() if entry["spec"] == spec), "")
    name = name or free_name(spec, known)
    towers = {**known.towers, name: {"spec": spec, "weights_sha256": weights_sha256}}
    replace(known, chosen=name, towers=towers).write(registry_file())
    return name


def free_name(spec: str, known: Registry) -> str:
    """The last part of ``spec``, with a number appended if the name is in use."""
    stem = spec.partition("@")[0].rstrip("/").rpartition("/")[2]
    return next(
        name
        for number in range(1, len(known.towers) + 2)
        if (name := stem if number == 1 else f"{stem}-{number}") not in known.towers
    )


def forget(name: str) -> None:
    """Remove an entry; raises ValueError with the registered names if there is none called ``name``."""
    known = read()
    if name not in known.towers:
        raise ValueError(f"unknown tower {name!r}; {known.summary()}")
    towers = {key: entry for key, entry in known.towers.items() if key != name}
    replace(known, chosen="" if known.chosen == name else known.chosen, towers=towers).write(registry_file())
