"""The miniature through ``vlm build`` and transformers' Trainer: scripts/quickstart/vlm.py with tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from serve_checkpoints import tower_directory
from tiny_llm import save_tiny_llm

SCRIPTS = Path(__file__).parents[2] / "scripts" / "quickstart"


def prepare(output: Path) -> None:
    """What ``miniature.py prepare`` makes, of two pictures."""
    save_tiny_llm(output / "llm", "smollm2")
    (output / "data" / "images").mkdir(parents=True)
    rows, questions = [], []
    for color in ("red", "blue"):
        Image.new("RGB", (40, 30), color).save(output / "data" / "images" / f"{color}.png")
        turns = [("human", "<image>\nWhich color?"), ("gpt", color), ("human", "Sure?"), ("gpt", "yes")]
        said = [{"from": side, "value": text} for side, text in turns]
        rows.append({"image": f"{color}.png", "conversations": said})
        asked = {"question_id": color, "image": f"{color}.png", "text": "Which color?", "truth": color}
        questions.append({**asked, "kind": "emoji group", "cluster": color, "category": ""})
    for name in ("captions", "finetune"):
        (output / "data" / f"{name}.json").write_text(json.dumps(rows))
    (output / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def test_two_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 trains the projector, stage 2 the LLM, too; finished parts stay; sides trained otherwise are refused."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import miniature
    import vlm

    def side(name: str, *words: str) -> None:
        command = ["vlm.py", str(tower_directory("clip")), name, "--output", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", command)
        vlm.main()

    prepare(tmp_path)
    side("before", "--steps", "2", "2")
    made, answers = tmp_path / "vlm-before", tmp_path / "before.answers.jsonl"
    weights = [load_file(made / f"stage{stage}" / "model.safetensors") for stage in range(3)]
    for first, second, expected in ((0, 1, set()), (1, 2, {"language_model"})):
        changed = {
            name.split(".")[0] for name, value in weights[second].items() if not value.equal(weights[first][name])
        }
        assert changed == {"multi_modal_projector"} | expected
    assert [json.loads(line)["question_id"] for line in answers.read_text().splitlines()] == ["red", "blue"]

    answers.write_text("kept")
    side("before")
    assert answers.read_text() == "kept"
    side("after", "--steps", "2", "2")
    miniature.refuse_other_stages(tmp_path, "after")
    miniature.score(tmp_path, "after", "", None)
    assert len(list((tmp_path / "scores" / "after").rglob("*.scores.json"))) == 1
    options = made / "stage2.options"
    options.write_text(options.read_text().replace("2", "3"))
    with pytest.raises(ValueError, match="stage2"):
        miniature.refuse_other_stages(tmp_path, "after")
