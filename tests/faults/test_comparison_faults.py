"""Faults of score files: the file, the item and the value are named before anything is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, World, meet, rows

ITEMS = [{"id": f"q{number}", "score": float(number % 2), "cluster": f"i{number}"} for number in range(8)]
HEAD = {"kind": "llm2clip-scores", "format_version": 1, "benchmark": "own", "metrics": {"accuracy": 0.5}}


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({**HEAD, "model": path.stem, "items": items}))
    return path


def score(name: str, value: Any, said: str) -> Fault:
    says = f"{{w}}/b.scores.json: score of item 'q3' is {said}, expected a number from ..."
    return Fault(name, "", says, lambda w: write(w.path("b.scores.json"), [*ITEMS[:3], ITEMS[3] | {"score": value}]))


@rows(
    score("NaN", float("nan"), "nan"),
    score("infinite", float("inf"), "inf"),
    score("a text", "0.5", "'0.5'"),
    score("null", None, "None"),
    score("a list", [1], "[1]"),
    Fault("not JSON", "", "{w}/b.scores.json is not valid JSON ...", lambda w: w.path("b.scores.json").write_text("{")),
    Fault("no items", "", "{w}/b.scores.json has no items; ...", lambda w: write(w.path("b.scores.json"), [])),
    Fault(
        "an item twice",
        "",
        "{w}/b.scores.json has item q0 twice; score the answers again",
        lambda w: write(w.path("b.scores.json"), [ITEMS[0], ITEMS[0]]),
    ),
    Fault("no file", "", "no score file or folder {w}/b.scores.json"),
)
def test_score_files(fault: Fault, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    base = write(tmp_path / "a.scores.json", ITEMS)
    command = ["compare", str(base), str(tmp_path / "b.scores.json"), "--output", str(tmp_path / "page")]
    meet(fault, world, command, capsys)
    assert not (tmp_path / "page").exists()
