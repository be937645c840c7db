"""docs/fidelity.md says what the recipes say, and covers every recipe that bears a paper's name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llm2clip_plugin.stages.tower_config import RECIPES

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("fidelity", ROOT / "scripts" / "fidelity.py")
fidelity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fidelity)


def test_the_page_is_what_the_recipes_say():
    page = fidelity.PAGE.read_text(encoding="utf-8")
    assert fidelity.filled(page) == page, "run scripts/fidelity.py --write"
    assert fidelity.filled(page.replace("| 0.9 0.999; 1e-08 |", "| 0.9 0.98; 1e-06 |")) == page
    named = {name for names in fidelity.NAMES.findall(page) for name in names.split()}
    assert "paper-llama-8b" in named
    assert {name for name in RECIPES if name.startswith(("openai", "eva02", "siglip2", "lift"))} <= named | {
        "eva02_bige14"
    }
