"""One file a family; each defines ``FAMILY``. A new file is a new family: the registry finds it here."""

from __future__ import annotations

from llm2clip_plugin.discovery import discover
from llm2clip_plugin.vision.family import Family


def families() -> dict[str, Family]:
    """Every family by name."""
    return discover(__name__, "FAMILY")
