"""How --help lays out its rows: an option, what it is, its default."""

import textwrap
from dataclasses import MISSING
from typing import Any

WIDTH = 110
COLUMN = 30  # where the texts of options begin


def row(spelled: str, text: str) -> str:
    first = f"  {spelled:<{COLUMN - 3}} "
    lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    if len(first) > COLUMN:
        lines = ["", *lines]
    return "\n".join(
        [(first + lines[0]).rstrip(), *(" " * COLUMN + line for line in lines[1:])]
    )


def written_default(default: Any) -> str:
    """A default as --help shows it; "" for one that says nothing."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default in ("", None, MISSING) or isinstance(default, bool):
        return ""
    return (
        f" (default: {default:g})"
        if isinstance(default, float)
        else f" (default: {default})"
    )
