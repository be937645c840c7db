"""What a user gets wrong ends in one sentence that names it; nothing is scored by accident."""

import json

import pytest
from golden_mllm import BENCHMARKS, ROOT, answers
from PIL import Image

from llava_integration.evaluator.answer.questions import Question
from llava_integration.evaluator.benchmarks.bench import main_score
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError


def command(name, path, tmp_path, *more):
    output = tmp_path / "scores.json"
    output.unlink(missing_ok=True)
    main_score(
        [
            name,
            "--data",
            str(ROOT / name),
            "--answers",
            str(path),
            "--json",
            str(output),
            *more,
        ]
    )
    return json.loads(output.read_text(encoding="utf-8"))


def lines_of(name, model="model-a"):
    return answers(name, model).read_text(encoding="utf-8").splitlines(keepends=True)


def rows_of(name):
    return [json.loads(line) for line in lines_of(name)]


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "answers.jsonl"
    text = (
        text
        if isinstance(text, str)
        else "".join(json.dumps(row) + "\n" for row in text)
    )
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_of_another_benchmark(name, tmp_path):
    """Also where the ids coincide: POPE's 1, 2, 3 are VizWiz's too."""
    for other in set(BENCHMARKS) - {name}:
        with pytest.raises(ValueError, match=rf"{name}"):
            command(name, answers(other, "model-a"), tmp_path, "--allow-missing")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_half_a_file_and_the_order_of_lines(name, tmp_path):
    """Half is refused unless allowed; answers turned round give the same scores."""
    lines = lines_of(name)
    path = written(tmp_path, "".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match="--allow-missing"):
        command(name, path, tmp_path)
    record = command(name, path, tmp_path, "--allow-missing")
    assert record["counts"]["missing"] >= 0.4 * record["counts"]["questions"]
    straight = command(name, answers(name, "model-b"), tmp_path)
    if not straight["counts"][
        "doubled"
    ]:  # of two answers to a question the last counts
        turned = command(
            name,
            written(tmp_path, "".join(reversed(lines_of(name, "model-b")))),
            tmp_path,
        )
        assert turned["metrics"] == pytest.approx(straight["metrics"], abs=1e-9)


def test_faults_that_are_counted(tmp_path):
    """A last line that a kill cut off, a null where the text should be, a question answered
    twice."""
    record = command("gqa", written(tmp_path, "".join(lines_of("gqa"))[:-20]), tmp_path)
    assert record["counts"]["unparsable"] == 1
    assert record["counts"]["missing"] == 1
    assert any("line 160" in note for note in record["notes"])
    rows = rows_of("gqa")
    record = command(
        "gqa", written(tmp_path, [{**rows[0], "text": None}, *rows[1:]]), tmp_path
    )
    assert record["counts"]["unparsable"] == 1
    assert record["counts"]["missing"] == 1
    record = command(
        "gqa", written(tmp_path, [*rows, {**rows[0], "text": "zebra"}]), tmp_path
    )
    assert record["counts"]["doubled"] == 1
    assert (
        next(item for item in record["items"] if item["id"] == rows[0]["question_id"])[
            "answer"
        ]
        == "zebra"
    )
    with pytest.raises(ValueError, match="duplicate"):
        command("gqa", written(tmp_path, rows * 2), tmp_path)


def test_encodings_and_what_editors_and_tables_change(tmp_path):
    text = "".join(lines_of("vqav2"))
    with pytest.raises(ValueError, match="UTF-8"):
        command(
            "vqav2",
            written(tmp_path, text.replace('"text": "', '"text": "á', 1), "latin-1"),
            tmp_path,
        )
    plain = command("vqav2", answers("vqav2", "model-a"), tmp_path)["metrics"]
    windows = written(tmp_path, text.replace("\n", "\r\n"), "utf-8-sig")
    assert command("vqav2", windows, tmp_path)["metrics"] == plain
    for kind in (float, str):  # ids
        rows = [
            {**row, "question_id": kind(row["question_id"])} for row in rows_of("vqav2")
        ]
        assert command("vqav2", written(tmp_path, rows), tmp_path)["metrics"] == plain
    for number in range(4):  # chunks of a multi-GPU run
        (tmp_path / f"{number}_4.jsonl").write_text(
            "".join(lines_of("vqav2")[number::4]), encoding="utf-8"
        )
    assert command("vqav2", tmp_path, tmp_path)["metrics"] == plain
    for number in range(2):  # of another run, on two GPUs
        (tmp_path / f"{number}_2.jsonl").write_text("".join(lines_of("vqav2")))
    with pytest.raises(ValueError, match="has chunks of 2 and of 4"):
        command("vqav2", tmp_path, tmp_path)
    for number in range(2):
        (tmp_path / f"{number}_2.jsonl").unlink()
    (tmp_path / "2_4.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"2_4.jsonl"):
        command("vqav2", tmp_path, tmp_path)


def test_files_that_hold_no_answers(tmp_path):
    with pytest.raises(ValueError, match="question file"):
        command("pope", ROOT / "pope" / "llava_pope_test.jsonl", tmp_path)
    for name in ("mme", "textvqa"):  # joined by the prompt
        rows = [
            {"question_id": row["question_id"], "text": row["text"]}
            for row in rows_of(name)
        ]
        with pytest.raises(ValueError, match=f"no question of {name}"):
            command(name, written(tmp_path, rows), tmp_path)
    with pytest.raises(ValueError, match="<image>"):
        command(
            "scienceqa",
            written(tmp_path, "".join(lines_of("scienceqa")).replace("<image>", "")),
            tmp_path,
        )


@pytest.mark.parametrize(
    "item",
    [{"id": 7, "score": float("nan")}, {"id": 7, "score": 1, "r1": float("inf")}],
)
def test_a_score_that_is_no_number_names_file_and_item(tmp_path, item):
    record = ScoreFile(
        benchmark="own", metrics={}, items=[{"id": 1, "score": True}, item], model="m"
    )
    path = record.write(tmp_path / "own.scores.json")
    with pytest.raises(ContractError, match=f"^{path}: .* of item 7"):
        load_side(path)


def test_an_image_that_cannot_be_read_names_the_question(tmp_path):
    """Too large to be decoded, damaged, or not base64."""
    Image.new("1", (13300, 13300)).save(tmp_path / "bomb.png")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for image, embedded in (
        ("bomb.png", False),
        ("x.png", False),
        ("not base64!", True),
    ):
        with pytest.raises(ValueError, match="question 'q': cannot read"):
            Question(
                id="q", text="", prompt="", image=image, embedded=embedded
            ).open_image(str(tmp_path))
