"""Open lists: every module of a folder that defines what is asked for. Standard library only."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def discover(package: str, attribute: str) -> dict[str, Any]:
    """``attribute`` of every module in the folder of ``package`` that has it, or each one in a list
    of them, by its ``name``. Raises ValueError if two members share a name."""
    members: dict[str, Any] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        value = getattr(
            importlib.import_module(f"{package}.{module.name}"), attribute, []
        )
        for member in value if isinstance(value, list) else [value]:
            if member.name in members:
                name = f"{attribute}.name {member.name!r}"
                raise ValueError(
                    f"two members of {package} have the {name}; rename one"
                )
            members[member.name] = member
    return members
