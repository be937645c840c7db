"""How --help lays out its rows: an option, what it is, its default."""

import textwrap
from dataclasses import MISSING
from pathlib import Path
from typing import Any

WIDTH = 110
COLUMN = 30  # where the texts of options begin
INSTALLED = Path(__file__).parents[2]  # the folder that the package is in


def row(spelled: str, text: str) -> str:
    first = f"  {spelled:<{COLUMN - 3}} "
    lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    if len(first) > COLUMN:
        lines = ["", *lines]
    rows = [(first + lines[0]).rstrip()]
    for line in lines[1:]:
        rows.append(" " * COLUMN + line)
    return "\n".join(rows)


def written_default(default: Any) -> str:
    """A default as --help shows it; "" for one that says nothing. A file of the package has the
    path that it has in the package."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default in ("", None, MISSING) or isinstance(default, bool):
        return ""
    if isinstance(default, float):
        return f" (default: {default:g})"
    text = str(default).removeprefix(f"{INSTALLED}/")
    return f" (default: {text})"
