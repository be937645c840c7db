"""The LLaVA miniature: both sides are started alike but for the tower; its data; the scores of open
answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import miniature
import miniature_data
import miniature_scores
import pytest

from llm2clip_plugin.contracts import ScoreFile

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "quickstart" / "miniature.sh"
PYTHON = """#!/bin/bash
# writes what the miniature waits for, and trains nothing
printf '%s\\n' "$*" >>"$WORDS"
[ "$1" != scripts/quickstart/miniature.py ] || [ "$2" != prepare ] || mkdir -p "$4/llm" "$4/data"
while [ $# -gt 1 ]; do
    [ "$1" != --output_dir ] || { mkdir -p "$2" && touch "$2/trainer_state.json"; }
    shift
done
"""


@pytest.fixture(params=["tiny", "chatml"])
def output(request, tmp_path: Path) -> Path:
    """A miniature of two seeds with towers before, after-0 and after-1, its stages started but not
    run."""
    for name in ("before", "after-0", "after-1", "chatml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "llm2clip.json").write_text("{}")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    llm = "tiny" if request.param == "tiny" else str(tmp_path / "chatml")
    words = [
        "--before",
        "before",
        "--after",
        "after-{seed}",
        "--output",
        "out",
        "--llm",
        llm,
        "--seeds",
        "2",
    ]
    variables = {
        **os.environ,
        "LLAVA_PYTHON": str(tmp_path / "python"),
        "WORDS": str(tmp_path / "words"),
    }
    subprocess.run(
        ["bash", SCRIPT, *words],
        cwd=tmp_path,
        env=variables,
        check=True,
        capture_output=True,
    )
    return tmp_path / "out"


def test_both_sides_are_started_alike_but_for_the_tower(output: Path) -> None:
    trained = [
        line
        for line in (output.parent / "words").read_text().splitlines()
        if "llava.train.train" in line
    ]
    for option in (
        "--learning_rate",
        "--max_steps",
        "--per_device_train_batch_size",
        "--data_path",
    ):
        for kind in ("-", "-lora-"):
            before = [
                line for line in trained if f"unfinished-llava{kind}before" in line
            ]
            after = [line for line in trained if f"unfinished-llava{kind}after" in line]
            values = [last(line, option) for line in before]
            assert values == [last(line, option) for line in after], option
            assert values or kind == "-lora-", option


def test_each_training_has_its_own_seed(output: Path) -> None:
    lines = (output.parent / "words").read_text().splitlines()
    seeds = {}
    for line in lines:
        if "llava.train.train" in line:
            seeds[Path(last(line, "--output_dir")).name.removeprefix("unfinished-")] = (
                last(line, "--seed")
            )
    # the language model of both, once
    trained = {name: seed for name, seed in seeds.items() if name != "words"}
    assert len(trained) == 8
    assert trained == {name: "1" if "-seed1" in name else "0" for name in trained}


def test_both_sides_are_compared_with_their_pictures(output: Path) -> None:
    (compared,) = [
        line
        for line in (output.parent / "words").read_text().splitlines()
        if " compare " in line
    ]
    assert last(compared, "--image-folder") == str(output / "data" / "images")


def last(line: str, option: str) -> str:
    """The value that counts: the last one given."""
    words = line.split()
    return words[len(words) - words[::-1].index(option)]


def test_sides_that_were_trained_otherwise_are_refused(output: Path) -> None:
    for name in ("after", "after-seed1"):
        miniature.refuse_other_stages(output, name)
    path = output / "llava-after-pretrain.options"
    path.write_text(path.read_text().replace("--data_path", "--learning_rate"))
    command = [
        sys.executable,
        SCRIPT.parent / "miniature.py",
        "score",
        "after",
        "--output",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_each_turn_of_a_conversation_counts_as_a_guess(tmp_path: Path) -> None:
    asked = [
        miniature_data.talk(f"q{n}", "Which?", answer, f"{n // 2}.png")
        for n, answer in enumerate("abbabb")
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "finetune.json").write_text(
        json.dumps(miniature_data.conversations(asked))
    )
    assert miniature_scores.guesses(tmp_path) == {"Which?": "b"}


def row(concept: str, answer: str, truth: str, *keywords: str) -> dict:
    about = {
        "question_id": f"noto-{concept}",
        "concept": concept,
        "cluster": "family",
        "category": "Animals",
        "image": f"{concept}.png",
    }
    return {
        **about,
        "text": "?",
        "answer": answer,
        "truth": truth,
        "keywords": [*keywords],
        "kind": miniature_data.OPEN,
    }


def points(made: ScoreFile) -> list[float]:
    return [item["score"] for item in made.items]


def test_an_open_answer_counts_above_the_same_answer_to_other_pictures() -> None:
    seen = [
        row("1", "A cat with a hat", "black cat", "feline"),
        row("2", "the Feline.", "lion", "feline", "king"),
    ]
    seen += [
        row("3", "with the", "man with the hat"),
        row("4", "", "T-Rex", "dinosaur"),
    ]
    made = miniature_scores.by_keyword(seen)
    # of the pictures of the three others, "cat hat" has the hat of 3, "feline" that of 1
    assert points(made) == [
        pytest.approx(100 * 2 / 3),
        pytest.approx(100 * 2 / 3),
        0,
        0,
    ]
    assert made.metrics["pictures_exchanged"] == pytest.approx(100 / 6)
    same = miniature_scores.by_keyword(
        [row(str(number), "a face", "happy face") for number in range(4)]
    )
    assert points(same) == [0, 0, 0, 0]
    assert same.metrics["pictures_exchanged"] == 100
    twice = [
        row("1", "cat", "cat"),
        {**row("1", "cat", "cat"), "question_id": "fluent-1"},
        row("2", "dog", "cow"),
    ]
    # pictures of the same emoji are not exchanged
    assert points(miniature_scores.by_keyword(twice)) == [100, 100, 0]


def test_the_pictures_of_a_family_are_one_cluster(tmp_path: Path) -> None:
    family_of = {
        about["concept"]: about["family"]
        for _, _, about in miniature_data.emoji("validation")
    }
    rows = list(
        miniature_data.hold_out(tmp_path, "validation", in_words=False, smoke=True)
    )
    assert {row["concept"] for row in rows} <= set(family_of)
    for row in rows:
        assert row["cluster"] == family_of[row["concept"]]
    assert len({row["cluster"] for row in rows}) < len({row["concept"] for row in rows})
