"""Loss terms, one per file: a file that defines ``TERM`` is the term of ``--loss.terms NAME=WEIGHT``."""

from llm2clip_plugin.files import discover
from llm2clip_plugin.train.losses.base import LossTerm


def loss_terms() -> dict[str, type[LossTerm]]:
    """Every loss term by name."""
    return discover(__name__, "TERM")
