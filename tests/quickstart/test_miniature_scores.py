"""Scores of the miniature's open answers: a word of the name or a keyword, a teacher's cosine, pictures exchanged."""

from __future__ import annotations

import json

import miniature_scores as scores
import pytest

from llm2clip_plugin.contracts import ScoreFile


def row(concept: str, answer: str, truth: str, *keywords: str) -> dict:
    return {
        "question_id": f"noto-{concept}",
        "cluster": concept,
        "category": "Animals",
        "text": "What?",
        "answer": answer,
        "truth": truth,
        "keywords": list(keywords),
        "image": f"{concept}.png",
        "kind": scores.OPEN,
    }


ROWS = [
    row("1", "A cat with a hat", "black cat", "feline"),
    row("2", "the Feline.", "lion", "feline", "king"),
    row("3", "with the", "man with the hat"),
    row("4", "", "T-Rex", "dinosaur"),
]


def points(made: ScoreFile | None) -> list[float]:
    assert made is not None
    return [item["score"] for item in made.items]


def test_an_answer_counts_with_a_word_that_says_something():
    made = scores.by_keyword(ROWS)
    # of the pictures of the three others, "cat hat" has the hat of 3, "feline" that of 1
    assert points(made) == [pytest.approx(100 * 2 / 3), pytest.approx(100 * 2 / 3), 0, 0]
    assert made is not None and made.metrics == {
        "word_of_the_name_or_a_keyword": 50.0,
        "pictures_exchanged": pytest.approx(100 / 6),
        "above": pytest.approx(100 / 3),
    }
    assert scores.by_keyword([]) is None


def test_saying_the_same_of_every_picture_scores_nothing():
    made = scores.by_keyword([row(str(number), "a face", "happy face") for number in range(4)])
    assert points(made) == [0, 0, 0, 0] and made is not None and made.metrics["pictures_exchanged"] == 100


def test_pictures_of_the_same_emoji_are_not_exchanged():
    twice = [row("1", "cat", "cat"), {**row("1", "cat", "cat"), "question_id": "fluent-1"}, row("2", "dog", "cow")]
    assert points(scores.by_keyword(twice)) == [100, 100, 0]


def test_a_teacher_compares_answers_with_names():
    class Letters:  # cosine of two texts: 1 if they begin alike, else -1
        def cosines(self, answers, names):
            return [[1.0 if answer[0] == name[0] else -1.0 for name in names] for answer in answers]

    made = scores.by_teacher([row("1", "cat", "cow"), row("2", "cow", "dog"), row("3", "", "?")], Letters())  # type: ignore[arg-type]
    assert points(made) == [100, -50, 0]  # "cow" is the cow of 1; empty is 0 whatever stands for it
    assert scores.by_teacher(ROWS, None) is None


def test_files_are_written_by_side_and_seed(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    questions = [{**row("1", "", "black cat"), "keywords": []}]
    questions += [
        {"question_id": "q", "cluster": "1", "category": "c", "text": "Which?", "truth": "Food", "image": "1.png"}
    ]
    questions[1]["kind"] = scores.CLOSED[0]
    (tmp_path / "data" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Food"}]
    (tmp_path / "data" / "finetune.json").write_text(json.dumps([{"conversations": turns}]))
    answers = [{"question_id": "noto-1", "text": "cat"}, {"question_id": "q", "text": "food "}]
    (tmp_path / "after-seed2.answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    scores.score(tmp_path, "after-seed2", "a miniature", None)
    made = {path.name: ScoreFile.read(path) for path in (tmp_path / "scores" / "after" / "seed2").iterdir()}
    assert set(made) == {"emoji-group.scores.json", "emoji-name-keyword.scores.json"}  # no easy-vqa, no teacher
    group = made["emoji-group.scores.json"]
    assert (group.model, group.notes[0], group.metrics) == (
        "after",
        "a miniature",
        {"accuracy": 100, "without_looking": 100},
    )
    assert "100.0 % of 1" in capsys.readouterr().out
