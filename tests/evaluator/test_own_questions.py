"""Own questions: planned, scored and compared from one JSONL."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_integration.evaluator.answer.command import answer_settings
from llava_integration.evaluator.answer.questions import COMMAND
from llava_integration.evaluator.benchmarks.bench import plans
from llm2clip_plugin.cli import main

ROWS = [
    {
        "image": "photos/a.png",
        "question": "Which shape?",
        "answer": "circle",
        "category": "shape",
    },
    {
        "image": "photos/a.png",
        "question": "Is it red?",
        "answer": "yes",
        "category": "color",
    },
    {
        "image": "photos/b.png",
        "question": "Which color?",
        "answer": ["dark red", "maroon"],
        "category": "color",
    },
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """own.jsonl, next to the folder of its images."""
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), (200, 20, 20)).save(
            tmp_path / "photos" / f"{name}.png"
        )
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "own.jsonl"


def test_a_file_is_planned_scored_and_compared(file: Path, tmp_path: Path):
    (task,) = plans([], file, tmp_path / "generated")
    assert not task.missing
    assert task.image_folder == tmp_path
    asked = [json.loads(line) for line in task.question_file.read_text().splitlines()]
    assert asked[0]["text"].startswith("Which shape?\nAnswer")
    assert asked[0]["image"] == "photos/a.png"
    answers = {
        "old": ("circles", "No", "blue"),
        "new": ("A Circle.", "no, yes", "it is a dark red one"),
    }
    for side, texts in answers.items():
        rows = [
            {"question_id": row["question_id"], "prompt": row["text"], "text": text}
            for row, text in zip(asked, texts, strict=True)
        ]
        (tmp_path / f"{side}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        words = [
            "score",
            "questions",
            str(file),
            "--answers",
            str(tmp_path / f"{side}.jsonl"),
        ]
        assert main([*words, "--output", str(tmp_path / f"{side}.scores.json")]) == 0
    old, new = (
        json.loads((tmp_path / f"{side}.scores.json").read_text()) for side in answers
    )
    assert [item["score"] for item in old["items"]] == [0, 0, 0]
    assert [item["score"] for item in new["items"]] == [1, 0, 1]
    assert new["metrics"]["categories.color"] == 50.0
    sides = [str(tmp_path / f"{side}.scores.json") for side in ("old", "new")]
    assert main(["compare", *sides, "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "compare.html").read_text()
    assert "own questions" in page
    assert page.count("data:image/jpeg") == 2  # found next to the file


@pytest.mark.parametrize(
    "change", [{"answer": []}, {"answer": 3}, {"question": " "}, {"image": None}]
)
def test_a_row_that_cannot_be_asked_is_named(
    file: Path, capsys: pytest.CaptureFixture[str], change: dict
):
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | change) + "\n")
    assert main(["score", "questions", str(file), "--answers", str(file)]) == 2
    assert f"{file}, question 2" in capsys.readouterr().err


def test_a_missing_picture_and_answers_that_are_none_are_named(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = [json.dumps(ROWS[0])] * 5 + [
        json.dumps(ROWS[0] | {"image": "photos/c.png"})
    ]
    file.write_text("\n".join(lines))
    (task,) = plans([], file, tmp_path / "generated")
    assert "missing, such as photos/c.png" in task.missing  # the last of six
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "photos" / "a.png").unlink()
    (task,) = plans([], file, tmp_path / "generated")
    named = f"pictures of own.jsonl are missing, such as photos/a.png in {tmp_path}"
    assert task.missing == named
    (tmp_path / "answers.csv").write_text("item,score\n")
    words = ["score", "questions", str(file), "--output", str(tmp_path / "scores.json")]
    assert main([*words, "--answers", str(tmp_path / "answers.csv")]) == 2
    assert "no line is a JSON object; line 1 (" in capsys.readouterr().err


def test_a_changed_base_model_is_another_setting(file: Path, tmp_path: Path):
    """As of a LoRA whose base was trained again in the same folder."""
    for name in ("llava-lora", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    words = [
        "--model-path",
        f"{tmp_path}/llava-lora",
        "--model-base",
        f"{tmp_path}/base",
    ]
    words += [
        "--question-file",
        str(file),
        "--answers-file",
        f"{tmp_path}/answers.jsonl",
    ]
    options = COMMAND.parse(words)
    before = answer_settings(options, None)
    assert answer_settings(options, None) == before
    (tmp_path / "base" / "model.safetensors").write_text("trained again")
    after = answer_settings(options, None)
    assert {name for name in after if after[name] != before[name]} == {
        "model_base_sample_sha256"
    }


def test_questions_in_another_form_are_told_how_to_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "own.json").write_text(json.dumps(ROWS))
    (task,) = plans([], tmp_path / "own.json", tmp_path / "generated")
    assert f"`jq -c '.[]' {tmp_path}/own.json > NEW.jsonl`" in task.missing
    (tmp_path / "own.csv").write_text(
        "\ufeffimage,question,answer\na.png,Is it red?,yes\nb.png,Is it red?,yes\n"
    )
    (task,) = plans([], tmp_path / "own.csv", tmp_path / "generated")
    assert f'csv.DictReader(open("{tmp_path}/own.csv"' in task.missing
    # a path that a shell would split, of which the printed command makes what is read
    spaced = tmp_path / "it's my own.csv"
    spaced.write_bytes((tmp_path / "own.csv").read_bytes())
    (task,) = plans([], spaced, tmp_path / "generated")
    _, printed, _ = task.missing.split("`")
    python, option, code, *to_file = shlex.split(printed)
    assert (python, option, to_file) == ("python", "-c", [">", "NEW.jsonl"])
    with (tmp_path / "NEW.jsonl").open("w") as new:
        subprocess.run([sys.executable, option, code], stdout=new, check=True)
    rows = [json.loads(line) for line in (tmp_path / "NEW.jsonl").open()]
    answers = {"question": "Is it red?", "answer": "yes"}
    assert rows == [{"image": "a.png", **answers}, {"image": "b.png", **answers}]
    spaced = spaced.rename(spaced.with_suffix(".json"))
    (task,) = plans([], spaced, tmp_path / "generated")
    _, printed, _ = task.missing.split("`")
    assert shlex.split(printed) == ["jq", "-c", ".[]", str(spaced), ">", "NEW.jsonl"]
    (tmp_path / "own.jsonl").write_text(json.dumps(ROWS[0]))
    words = ["llava", "evaluate", "--endpoint", "http://localhost:1"]
    words += ["--question-file", f"{tmp_path}/own.jsonl", "--answers-file", "a.jsonl"]
    assert main(words) == 2
    assert f"`llm2clip bench-mllm {tmp_path}/own.jsonl ...`" in capsys.readouterr().err
