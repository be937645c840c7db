"""Plugins: a folder with one file per member, discovered by importing them all."""

import ast
import importlib
import pkgutil
from pathlib import Path
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


def literals(package: str, attribute: str) -> dict[str, dict[str, Any]]:
    """What ``discover`` finds, as the literal arguments of each ``attribute = Kind(name="...", ...)``, by ``name``.

    Only ``package`` itself is imported: for texts of --help about members whose modules import much.
    """
    members: dict[str, dict[str, Any]] = {}
    for folder in importlib.import_module(package).__path__:
        for file in sorted(Path(folder).glob("[!_]*.py")):
            for node in ast.parse(file.read_bytes()).body:
                if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
                    continue
                values: dict[str, Any] = {
                    str(word.arg): word.value.value
                    for word in node.value.keywords
                    if isinstance(word.value, ast.Constant)
                }
                if ast.unparse(node.targets[0]) == attribute and "name" in values:
                    members[values["name"]] = values
    return members
