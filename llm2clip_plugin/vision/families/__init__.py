"""One file a family; each defines ``FAMILY``. A new file is a new family: the registry finds it here."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from llm2clip_plugin.vision.family import Family


@functools.lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Every family by name."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.FAMILY.name: module.FAMILY for module in modules}
