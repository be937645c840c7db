"""Optimizers, one per file: a file that defines ``OPTIMIZER`` is the one of ``--optimizer NAME``."""

from llm2clip_plugin.files import discover
from llm2clip_plugin.train.optimizers.base import OptimizerSpec


def optimizers() -> dict[str, type[OptimizerSpec]]:
    """Every optimizer by name."""
    return discover(__name__, "OPTIMIZER")
