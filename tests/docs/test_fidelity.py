"""docs/fidelity.md says what the recipes say, and covers every recipe that bears a paper's name.

    python tests/docs/test_fidelity.py      writes the page's column "ours"

A line ``<!-- recipes: NAME ... -->`` names the recipes of the next table. In a row whose first cell
has options in backticks, the third cell is their values, by family of recipes where these differ.
Other rows stay.
"""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

from llm2clip_plugin.stages.llm_config import LLM_RECIPES
from llm2clip_plugin.stages.tower_config import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
NAMES = re.compile(r"<!-- recipes: (.+) -->")
OPTION = re.compile(r"`([a-z_0-9.]+)`")


def shown(value: Any) -> str:
    """A setting as the page prints it."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        "unset"
        if value is None
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def ours(options: list[str], names: list[str]) -> str:
    """Values of ``options`` in the recipes; one value, or one for each family, which is a name's
    first word."""
    by_value: dict[str, list[str]] = {}
    for name in names:
        settings = {**RECIPES, **LLM_RECIPES}[name]()
        families = by_value.setdefault(
            "; ".join(shown(attrgetter(option)(settings)) for option in options), []
        )
        families += {re.split("[-_]", name)[0]} - set(families)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "<br>".join(
        f"{', '.join(families)}: {values}" for values, families in by_value.items()
    )


def filled(page: str) -> str:
    """The page with its generated cells."""
    names = []
    lines = []
    for line in page.splitlines():
        if match := NAMES.fullmatch(line):
            names = match[1].split()
        cells = line.split(" | ")
        if line.startswith("| ") and (options := OPTION.findall(cells[0])):
            cells[2] = ours(options, names)
            line = " | ".join(cells)
        lines.append(line)
    return "\n".join(lines) + "\n"


def test_the_page_is_what_the_recipes_say():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run python tests/docs/test_fidelity.py"
    assert filled(page.replace("| 0.9 0.999; 1e-08 |", "| 0.9 0.98; 1e-06 |")) == page
    named = {name for names in NAMES.findall(page) for name in names.split()}
    assert "paper-llama-8b" in named
    papers = ("openai", "eva02", "siglip2", "proclip", "lift")
    of_papers = {name for name in RECIPES if name.startswith(papers)}
    assert of_papers - named <= {"eva02_bige14"}


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
