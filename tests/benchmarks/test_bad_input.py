"""What a user gets wrong ends in one sentence that says what, where and what to do; nothing is scored by accident."""

import json

import pytest
from golden_mllm import BENCHMARKS, ROOT, answers
from PIL import Image

from llava_integration.answer.questions import Question
from llava_integration.benchmarks.score import main
from llava_integration.compare.comparison import load_side
from llm2clip_plugin.cli import run
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError


def command(name, path, tmp_path, *more):
    output = tmp_path / "scores.json"
    output.unlink(missing_ok=True)
    main([name, "--data", str(ROOT / name), "--answers", str(path), "--json", str(output), *more])
    return json.loads(output.read_text(encoding="utf-8"))


def lines_of(name, model="model-a"):
    return answers(name, model).read_text(encoding="utf-8").splitlines(keepends=True)


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("other", BENCHMARKS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_of_another_benchmark(name, other, tmp_path):
    """Also where the ids coincide: POPE's 1, 2, 3 are VizWiz's too."""
    if name != other:
        with pytest.raises(ValueError, match=r"match no question of|but other questions"):
            command(name, answers(other, "model-a"), tmp_path, "--allow-missing")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_half_a_file(name, tmp_path):
    lines = lines_of(name)
    path = written(tmp_path, "".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match=r"have no answer in .*--allow-missing"):
        command(name, path, tmp_path)
    record = command(name, path, tmp_path, "--allow-missing")
    assert record["counts"]["missing"] >= 0.4 * record["counts"]["questions"]
    assert any("have no answer" in note for note in record["notes"])


def test_cut_off_in_the_middle_of_a_line(tmp_path):
    """A killed writer leaves half a last line: counted and shown, the rest is scored."""
    text = "".join(lines_of("gqa"))
    record = command("gqa", written(tmp_path, text[:-20]), tmp_path)
    assert record["counts"]["unparsable"] == 1 and record["counts"]["missing"] == 1
    assert any("line 160" in note for note in record["notes"])


def test_doubled_answers_are_counted_and_too_many_refused(tmp_path):
    lines = lines_of("gqa")
    first = json.loads(lines[0])
    record = command(
        "gqa", written(tmp_path, "".join([*lines, json.dumps({**first, "text": "zebra"}) + "\n"])), tmp_path
    )
    assert record["counts"]["doubled"] == 1
    assert next(item for item in record["items"] if item["id"] == first["question_id"])["answer"] == "zebra"
    with pytest.raises(ValueError, match="earlier line answered"):
        command("gqa", written(tmp_path, "".join(lines * 2)), tmp_path)


def test_order_of_lines_never_counts(tmp_path):
    """Every benchmark's answers turned round give the same scores."""
    for name in BENCHMARKS:
        lines = lines_of(name, "model-b")
        straight = command(name, answers(name, "model-b"), tmp_path)
        if not straight["counts"]["doubled"]:  # of two answers to a question the last counts
            turned = command(name, written(tmp_path, "".join(reversed(lines))), tmp_path)
            ignored = (
                ("by_order.", "lmms_eval.") if name == "textvqa" else ("by_order.",)
            )  # twins: see textvqa.Numbering
            for record in (straight, turned):
                record["metrics"] = {key: v for key, v in record["metrics"].items() if not key.startswith(ignored)}
            assert turned["metrics"] == pytest.approx(straight["metrics"], abs=1e-9), name


def test_wrong_encodings(tmp_path):
    text = "".join(lines_of("mme")).replace("Yes\\u3002", "Yes").replace('"No"', '"Ná"')
    with pytest.raises(ValueError, match=r"not UTF-8: byte 0xe1 at offset \d+, line \d+"):
        command("mme", written(tmp_path, text, "latin-1"), tmp_path)
    with pytest.raises(ValueError, match="UTF-16"):
        command("mme", written(tmp_path, text, "utf-16"), tmp_path)


def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    text = "".join(lines_of("pope"))
    plain = command("pope", answers("pope", "model-a"), tmp_path)
    windows = command("pope", written(tmp_path, text.replace("\n", "\r\n"), "utf-8-sig"), tmp_path)
    assert windows["metrics"] == plain["metrics"]


def test_empty_file_question_file_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        command("pope", written(tmp_path, " \n"), tmp_path)
    with pytest.raises(ValueError, match="is a question file"):
        command("pope", ROOT / "pope" / "llava_pope_test.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match="no answers at"):
        command("pope", tmp_path / "absent.jsonl", tmp_path)
    with pytest.raises(ValueError, match="has no answers: none of its 2 lines"):
        command("pope", written(tmp_path, "<html>\n</html>\n"), tmp_path)


def test_answers_that_are_not_text(tmp_path):
    """null where the text should be is not the word 'None'."""
    rows = [json.loads(line) for line in lines_of("gqa")]
    rows[3]["text"] = None
    record = command("gqa", written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)), tmp_path)
    assert record["counts"]["unparsable"] == 1 and record["counts"]["missing"] == 1


def test_data_folder_of_another_benchmark_or_release(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"testdev_balanced_questions.json"):
        main(["gqa", "--data", str(ROOT / "pope"), "--answers", str(answers("gqa", "model-a"))])
    with pytest.raises(FileNotFoundError, match="no folder"):
        main(["gqa", "--data", str(tmp_path / "x"), "--answers", str(answers("gqa", "model-a"))])
    with pytest.raises(ValueError, match=r"unknown benchmark 'gqq'; .*known: vqav2, gqa"):
        main(["gqq", "--data", ".", "--answers", "x"])


def test_ids_that_a_table_made_floats_or_texts(tmp_path):
    rows = [json.loads(line) for line in lines_of("vqav2")]
    plain = command("vqav2", answers("vqav2", "model-a"), tmp_path)
    for kind in (float, str):
        text = "".join(json.dumps({**row, "question_id": kind(row["question_id"])}) + "\n" for row in rows)
        assert command("vqav2", written(tmp_path, text), tmp_path)["metrics"] == plain["metrics"]


@pytest.mark.parametrize("name", ["mme", "textvqa"])
def test_rows_without_the_prompt_that_joins_them(name, tmp_path):
    rows = [json.loads(line) for line in lines_of(name)]
    text = "".join(json.dumps({key: row[key] for key in ("question_id", "text")}) + "\n" for row in rows)
    with pytest.raises(ValueError, match=f"have no prompt, which joins answers to {name}"):
        command(name, written(tmp_path, text), tmp_path)


def test_scienceqa_without_images(tmp_path):
    text = "".join(lines_of("scienceqa")).replace("<image>", "")
    with pytest.raises(ValueError, match=r"no prompt in .* has <image>"):
        command("scienceqa", written(tmp_path, text), tmp_path)


@pytest.mark.parametrize("name", ["llava_bench", "mmvet"])
def test_what_needs_a_judge_says_so(name, tmp_path):
    data = tmp_path / name
    data.mkdir()
    question = {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv"}
    (data / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (data / "mm-vet.json").write_text(
        json.dumps({"v1_0": {"imagename": "v1_0.png", "question": "What is it?", "answer": "x", "capability": ["rec"]}})
    )
    path = written(tmp_path, json.dumps({"question_id": 0, "prompt": "What is it?", "text": "A cat."}) + "\n")
    with pytest.raises(ValueError, match="needs a judge"):
        main([name, "--data", str(data), "--answers", str(path)])


def test_command_ends_with_status_2_and_one_line(tmp_path, capsys):
    status = run("score", ["gqa", "--data", str(ROOT / "gqa"), "--answers", str(written(tmp_path, ""))])
    shown = capsys.readouterr()
    assert status == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1 and "empty" in shown.err


def test_chunks_of_a_multi_gpu_run(tmp_path):
    """A folder of chunks is one file; a chunk that is not there is named."""
    lines = lines_of("vqav2")
    for number in range(4):
        (tmp_path / f"{number}_4.jsonl").write_text("".join(lines[number::4]), encoding="utf-8")
    record = command("vqav2", tmp_path, tmp_path)
    assert record["metrics"] == command("vqav2", answers("vqav2", "model-a"), tmp_path)["metrics"]
    (tmp_path / "2_4.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing the chunks \['2_4.jsonl'\]"):
        command("vqav2", tmp_path, tmp_path)


@pytest.mark.parametrize(
    "item, message",
    [
        ({"id": 7, "score": float("nan")}, "score of item 7 is nan, expected a number"),
        ({"id": 7, "score": float("inf")}, "score of item 7 is inf, expected a number"),
        ({"id": 7, "score": "good"}, "score of item 7 is 'good', expected a number"),
        ({"id": 7, "score": None}, "score of item 7 is None, expected a number"),
        ({"id": 7, "score": [1]}, r"score of item 7 is \[1\], expected a number"),
        ({"id": 7, "score": 1, "r1": float("nan")}, "r1 of item 7 is nan, expected a number"),
        ({"id": [7], "score": 1}, r"item 1 has the id \[7\], expected a text or a whole number"),
        ({"id": 7, "score": 1, "cluster": {}}, "item 7 has the cluster {}, expected a text"),
        ({"id": 7}, r"item 1 has the fields \['id'\]; every item needs id and score"),
    ],
)
def test_a_score_that_is_no_number_names_file_item_and_value(tmp_path, item, message):
    record = ScoreFile(benchmark="own", metrics={}, items=[{"id": 1, "score": True}, item], model="m")
    path = record.write(tmp_path / "own.scores.json")
    with pytest.raises(ContractError, match=f"^{path}: {message}"):
        load_side(path)


@pytest.mark.parametrize("size", [(13300, 13300), (100_000, 1)])
def test_an_image_too_large_is_refused_before_it_is_decoded(tmp_path, size):
    Image.new("1", size).save(tmp_path / "bomb.png")
    question = Question(id="q", text="", shown="", image="bomb.png")
    with pytest.raises(
        ValueError, match=rf"question 'q': cannot read .*bomb.png: the image has {size[0]} x {size[1]} "
    ):
        question.open_image(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"no image"])
def test_a_damaged_image_names_the_question(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="question 'q': cannot read"):
        Question(id="q", text="", shown="", image="x.png").open_image(str(tmp_path))
    with pytest.raises(ValueError, match="question 'q': cannot read the embedded image"):
        Question(id="q", text="", shown="", image="not base64!", embedded=True).open_image("")
