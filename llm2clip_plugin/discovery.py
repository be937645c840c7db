"""Plugins: a folder with one file per member, discovered by importing them all."""

import importlib
import pkgutil
from typing import Any


def discover(package: str, attribute: str) -> dict[str, Any]:
    """``attribute`` of every module in the folder of ``package``, by its ``name``, in the order of the file names.

    A module without the attribute is a helper of the others and is skipped. Raises ValueError if two members share a
    name.
    """
    members: dict[str, Any] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        member = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, None)
        if member is None:
            continue
        if member.name in members:
            raise ValueError(f"two files in {package} define {attribute}.name {member.name!r}; rename one of them")
        members[member.name] = member
    return members
