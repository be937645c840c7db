"""One file per layout of checkpoints, each defining ``LAYOUT``; ``hub.py`` reads what none of them recognizes."""

from llm2clip_plugin.files import discover
from llm2clip_plugin.vision.convert.common import Layout


def layouts() -> dict[str, Layout]:
    """Every layout by name."""
    return discover(__name__, "LAYOUT")
