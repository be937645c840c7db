"""One file per format that a tower directory can be converted to, each defining ``FORMAT``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm2clip_plugin.files import discover, literals

if TYPE_CHECKING:
    from llm2clip_plugin.vision.convert.exporting import Format


def formats() -> dict[str, Format]:
    """Every format by name."""
    return discover(__name__, "FORMAT")


def format_helps() -> dict[str, str]:
    """Name -> what --help says, of every format; imports none of them."""
    return {name: values.get("help", "") for name, values in literals(__name__, "FORMAT").items()}
