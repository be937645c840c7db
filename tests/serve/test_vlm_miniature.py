"""The miniature through ``vlm build`` and transformers' Trainer: ``miniature.py train`` with tiny
models."""

import json
from itertools import pairwise
from pathlib import Path

import miniature
import miniature_data
import miniature_scores
import pytest
from PIL import Image
from safetensors.torch import load_file
from serve_checkpoints import tower_directory
from tiny_llm import save_tiny_llm

TURNS = (
    ("human", "<image>\nWhich color?"),
    ("gpt", "red"),
    ("human", "Sure?"),
    ("gpt", "yes"),
)


def test_two_sides(tmp_path: Path) -> None:
    """Stage 1 trains the projector, stage 2 the LLM, too; finished parts stay; sides trained
    otherwise are refused."""

    def side(name: str, steps: int = 2) -> None:
        miniature.train_side(
            tmp_path, name, str(tower_directory("clip")), (steps, steps)
        )

    save_tiny_llm(tmp_path / "llm", "smollm2")
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "data" / "images" / "red.png")
    row = {
        "image": "red.png",
        "conversations": [{"from": speaker, "value": text} for speaker, text in TURNS],
    }
    for name in ("captions", "finetune"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([row] * 2))
    asked = {
        "question_id": "1",
        "image": "red.png",
        "text": "Which color?",
        "truth": "red",
        "kind": miniature_data.CLOSED[0],
    }
    (tmp_path / "data" / "questions.jsonl").write_text(
        json.dumps({**asked, "cluster": "", "category": ""})
    )
    side("before")
    made = tmp_path / "vlm-before"
    answers = tmp_path / "before.answers.jsonl"
    weights = [
        load_file(made / f"stage{stage}" / "model.safetensors") for stage in range(3)
    ]
    changed = []
    for old, new in pairwise(weights):
        changed.append(
            {name.split(".")[0] for name in new if not new[name].equal(old[name])}
        )
    assert changed == [
        {"multi_modal_projector"},
        {"multi_modal_projector", "language_model"},
    ]
    assert json.loads(answers.read_text())["question_id"] == "1"

    answers.write_text("kept")
    side("before", 3)
    assert answers.read_text() == "kept"
    side("after")
    miniature.refuse_other_stages(tmp_path, "after")
    miniature_scores.score(tmp_path, "after", "", None)
    side("before-seed1")
    side("after-seed1", 3)
    with pytest.raises(ValueError, match="vlm-after-seed1"):
        miniature.refuse_other_stages(tmp_path, "after-seed1")
