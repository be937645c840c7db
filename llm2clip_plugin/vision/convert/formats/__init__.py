"""One file per format that a tower directory can be converted to, each defining ``FORMAT``."""

from __future__ import annotations

from llm2clip_plugin.discovery import discover
from llm2clip_plugin.vision.convert.output_format import Format


def formats() -> dict[str, Format]:
    """Every format by name."""
    return discover(__name__, "FORMAT")
