"""Data of the miniature: questions about a picture are turns of one conversation for a real language model."""

from __future__ import annotations

import json
from pathlib import Path

import miniature
import miniature_scores as scores


def question(number: int, image: str, text: str, answer: str) -> dict:
    turns = miniature.talk(text, answer, picture=True)
    return {"id": f"q{number}", "image": image, "conversations": turns}


def test_questions_about_a_picture_are_one_conversation():
    asked = [question(n, f"{n % 2}.png", f"What is {n}?", str(n)) for n in range(2 * miniature.TURNS + 2)]
    made = miniature.conversations(asked)
    assert [(row["id"], row["image"], len(row["conversations"]) // 2) for row in made] == [
        ("q0", "0.png", miniature.TURNS),
        ("q8", "0.png", 1),
        ("q1", "1.png", miniature.TURNS),
        ("q9", "1.png", 1),
    ]
    for row in made:
        said = [turn["value"] for turn in row["conversations"]]
        assert said[0].startswith("<image>\nWhat") and not any("<image>" in text for text in said[1:])
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(said) // 2)
    unchanged = asked[2]["conversations"]
    assert [turn["value"] for turn in unchanged] == ["<image>\nWhat is 2?", "2"]


def test_a_guess_without_looking_counts_every_turn(tmp_path: Path):
    asked = [question(n, f"{n // 2}.png", "Which?", answer) for n, answer in enumerate(("a", "b", "b", "a", "b", "b"))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "finetune.json").write_text(json.dumps(miniature.conversations(asked)))
    assert scores.guesses(tmp_path) == {"Which?": "b"}
