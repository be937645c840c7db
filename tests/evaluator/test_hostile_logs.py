"""Logs of strangers: numbers that mean nothing, files that fill the memory, texts that no report
can hold."""

import gzip
import json
import os
import zipfile

import pytest
from reader_logs import LOGS

from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.comparison import NOTHING_PAIRED, build
from llava_integration.evaluator.compare.pairing import matched_by_number
from llava_integration.evaluator.compare.readers import Choices, file_formats
from llava_integration.evaluator.compare.sides import (
    load_models,
    load_side,
    run_number,
)
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError

RIGHT = [0, 1] * 10


def table(path, scores, **columns):
    """A CSV of items, scores and columns of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(["item", "score", *columns])]
    for number, score in enumerate(scores):
        lines.append(",".join(map(str, [number, score, *columns.values()])))
    path.write_text("\n".join(lines))
    return path


def sides(folder, names=("base", "new")):
    return [load_side(folder / name) for name in names]


def percent(scores):
    return [100 * score for score in scores]


def test_runs_of_a_side_on_two_scales_are_refused(tmp_path):
    """The largest score of each side is 100, so that the sides alone tell nothing."""
    for name in ("base", "new"):
        table(tmp_path / name / "seed1.csv", RIGHT, task="t")
        table(tmp_path / name / "seed2.csv", percent(RIGHT), task="t")
    with pytest.raises(ContractError, match=r"at most 1 in base \(seed1.csv\), new "):
        build(sides(tmp_path))


def test_the_seed_is_the_number_of_a_run(tmp_path):
    """Of "run2_seed1" and "run 2, seed 1"; a whole number in a table may have become 1.0."""
    for name, seeds in (("base", (1, 2)), ("new", (2, 1))):
        for place, seed in enumerate(seeds, 1):
            path = tmp_path / name / f"run{place}_seed{seed}.csv"
            table(path, RIGHT, task="t")
            path.write_text(path.read_text() + f"\n{100 + place},0,t")
    base, new = sides(tmp_path)
    in_base, in_new, notes = matched_by_number(
        "t", (base, base.runs["t"]), (new, new.runs["t"])
    )
    assert notes == []
    assert [run_number(run) for run in (*in_base, *in_new)] == [1, 2, 1, 2]
    assert [run.files[0].stem for run in in_new] == ["run2_seed1", "run1_seed2"]
    lines = ["item,score,run"]
    for run in ("3.0", "run 4, seed 5"):
        lines += [f'1,1,"{run}"', f'2,0,"{run}"']
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    (runs,) = load_side(tmp_path / "runs.csv").runs.values()
    assert [run_number(run) for run in runs] == [3, 5]


def test_pairing_without_runs_is_said(tmp_path):
    for name in ("base", "new"):
        for seed in (1, 2):
            table(tmp_path / name / f"seed{seed}.csv", RIGHT)
    assert NOTHING_PAIRED in build(sides(tmp_path), pair_runs=True).notes
    assert NOTHING_PAIRED not in build(sides(tmp_path)).notes


def test_equal_logs_of_two_models_are_no_copies(tmp_path):
    for model in ("a", "b"):
        path = tmp_path / "results" / model / "toy.json"
        path.parent.mkdir(parents=True)
        details = [{"correct": True, "pred": "x"}]
        path.write_text(json.dumps({"accuracy": 100.0, "details": details}))
    with pytest.raises(ContractError, match="logs of 2 models"):
        load_side(tmp_path)


def mmstar(folder, categories):
    """A log whose number is the mean of its categories."""
    folder.mkdir()
    lines = []
    for number in range(8):
        category = categories[number % len(categories)]
        average = {"l2_category": category, "score": number % 2}
        lines.append({"doc_id": number, "doc_hash": "", "average": average})
    text = "\n".join(map(json.dumps, lines))
    (folder / "20261129_100424_samples_mmstar.jsonl").write_text(text)
    return load_side(folder)


@pytest.mark.parametrize(("categories", "first"), [("ab", 2), ("c", 0), ("dcba", 0)])
def test_a_mean_of_other_categories_is_not_compared(tmp_path, categories, first):
    new = mmstar(tmp_path / "new", categories)
    with pytest.raises(ContractError, match=f"the category of question {first} is"):
        build([mmstar(tmp_path / "base", "abcd"), new])


def test_a_number_that_overflows_is_no_number(tmp_path):
    (path,) = (LOGS / "lm_eval_0.4.3").glob("samples_toy_text_*.jsonl")
    line = json.loads(path.read_text().splitlines()[0])
    line["word_perplexity"] = [-1e12, 1]
    (tmp_path / path.name).write_text(json.dumps(line))
    with pytest.raises(ContractError, match="is -inf, expected a finite number"):
        load_side(tmp_path / path.name)


def test_groups_that_hold_each_other_are_none(tmp_path):
    (results,) = (LOGS / "lm_eval_group").glob("results_*.json")
    body = json.loads(results.read_text())
    body["group_subtasks"] = {"a": ["b"], "b": ["a", "toy_a"]}
    for path in (LOGS / "lm_eval_group").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / results.name).write_text(json.dumps(body))
    side = load_side(tmp_path)
    assert side.notes == ()
    assert len(side.runs) == 2


def workbook(path, rows, *, first_rows=()):
    """A table of VLMEvalKit."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (*first_rows, ["index", "prediction", "hit"], *rows):
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def test_empty_rows_of_excel_are_passed_over(tmp_path):
    rows = [[1, "A", 1], [None, None, None], [2, "B", 0], [None, None, None]]
    path = workbook(tmp_path / "toy_result.xlsx", rows, first_rows=[[None] * 3])
    ((run,),) = load_side(path).runs.values()
    assert run.ids == ["1", "2"]


def test_a_title_above_the_header_of_excel_is_called_that(tmp_path):
    """Alone it is an error, with another log in the folder a note."""
    titled = workbook(
        tmp_path / "a_toy.xlsx", [[1, "A", 1]], first_rows=[["Our model"]]
    )
    said = r"a_toy\.xlsx, line 1 was taken for the header.*\(index, prediction, hit\)"
    with pytest.raises(ContractError, match=said):
        load_side(titled)
    workbook(tmp_path / "b_toy.xlsx", [[1, "A", 1]])
    (note,) = load_side(tmp_path).notes
    assert note.startswith(f"left out: {titled}, line 1 was taken for the header")


def test_an_excel_file_that_fills_the_memory_is_refused(tmp_path, monkeypatch):
    path = workbook(tmp_path / "toy_result.xlsx", [[1, "A", 1]])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/more.xml", "A" * 1_000_000)
    monkeypatch.setattr(file_formats, "MOST_UNPACKED", 1_000_000)
    with pytest.raises(ContractError, match=r"unpacks to 1,\d\d\d,\d\d\d bytes"):
        load_side(path)


def packed_log(folder, count):
    """A log of the harness, packed by gzip."""
    path = folder / "samples_toy_2026-11-28T21-57-04.1.jsonl.gz"
    line = {"doc_id": 0, "doc_hash": "", "metrics": ["acc"], "acc": 1}
    with gzip.open(path, "wt") as file:
        for number in range(count):
            file.write(json.dumps(line | {"doc_id": number}) + "\n")
    return path


def packed_eval(folder, count):
    """A log of inspect_ai, in which only its summaries are large."""
    path = folder / "toy.eval"
    score = {"scorer": "match", "metrics": {"accuracy": {"value": 1.0}}}
    header = {"status": "success", "results": {"scores": [score]}}
    sample = {"id": 1, "metadata": {}, "scores": {"match": {"value": "C"}}}
    samples = [sample | {"id": number} for number in range(count)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("summaries.json", json.dumps(samples))
        archive.writestr("samples/1_epoch_1.json", "A" * 10_000)  # is not read
    return path


@pytest.mark.parametrize("pack", [packed_log, packed_eval])
def test_a_packed_log_that_fills_the_memory_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(file_formats, "MOST_UNPACKED", 5_000)
    ((run,),) = load_side(pack(tmp_path, 10)).runs.values()
    assert len(run.ids) == 10
    with pytest.raises(ContractError, match=r"unpacks to .* bytes, expected at most"):
        load_side(pack(tmp_path, 1000))


TWICE = {
    "a.csv": "item,score,Score\n1,1,0\n",
    "a_result.tsv": "index\tprediction\thit\thit\n1\tA\t1\t0\n",
}


@pytest.mark.parametrize("name", TWICE)
def test_a_column_that_is_there_twice_is_refused(tmp_path, name):
    """One of them would be lost."""
    (tmp_path / name).write_text(TWICE[name])
    with pytest.raises(ContractError, match="has 2 columns"):
        load_side(tmp_path / name)


@pytest.mark.parametrize("cell", ["-" * 500_000 + "1", "__import__('os')", "{'a': 1}"])
def test_a_list_of_matches_that_is_none(tmp_path, cell):
    path = tmp_path / "m_ChartQA_TEST_results.tsv"
    path.write_text(f"index\tprediction\teval_match\teval_score\n0\tA\t{cell}\t1\n")
    with pytest.raises(ContractError, match="expected a list of numbers"):
        load_side(path)


def test_what_utf_8_cannot_hold_is_escaped_in_reports(tmp_path, capsys):
    """A file name that is not UTF-8, and half of a character in a log."""
    new = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    for path, score in ((tmp_path / "base.jsonl", 0), (new, 1)):
        line = {"item": "\ud800", "score": score, "task": "t\udfff"}
        path.write_text(json.dumps(line))
    words = [str(tmp_path / "base.jsonl"), str(new), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert main([*words, "--drift"]) == 0
    assert "\\udce9" in capsys.readouterr().out
    for name in ("compare.md", "compare.html", "drift.md"):
        assert "udce9" in (tmp_path / "out" / name).read_text()
    for name in ("compare.json", "drift.json"):
        json.loads((tmp_path / "out" / name).read_text())


FIELDS = {"choices": (None, 3, "AB"), "rows": ([1, 2], {"a": 1}, None)}


@pytest.mark.parametrize("name", FIELDS)
def test_the_page_takes_fields_of_other_types(tmp_path, name):
    for number, value in enumerate(FIELDS[name]):
        files = []
        for score in (0.0, 1.0):
            item = {"id": 1, "score": score, "answer": "a", name: value}
            record = ScoreFile(
                benchmark="t", metrics={}, items=[item], model=str(score)
            )
            files.append(str(record.write(tmp_path / f"{number}{score}.scores.json")))
        assert main([*files, "--output", str(tmp_path / "out")]) == 0


def test_two_sides_of_one_name_are_refused(tmp_path):
    """Their letters and scores would be one's."""
    lines = ["item,score,model"]
    for model, wins in (("m1", 18), ("m2", 3), ("", 2)):
        lines += [f"{number},{int(number < wins)},{model}" for number in range(20)]
    path = tmp_path / "m1.csv"  # whose name is that of the third side
    path.write_text("\n".join(lines))
    assert [side.name for side in load_models(path)] == ["m1 #0", "m2", "m1 #2"]
    with pytest.raises(ValueError, match=r"the same name \(a, a, b\)"):
        main([str(path), "--names", "a", "a", "b", "--all-pairs"])


def test_a_column_of_losses_is_noted(tmp_path):
    path = table(tmp_path / "a.csv", RIGHT, val_loss=2)
    ((run,),) = load_side(path, choices=Choices(metric="val_loss")).runs.values()
    assert "val_loss: a higher value counts as better" in run.notes[0]
    ((run,),) = load_side(path).runs.values()
    assert run.notes == []


def test_a_number_with_an_underscore_is_none(tmp_path):
    with pytest.raises(ContractError, match="score is '1_0'"):
        load_side(table(tmp_path / "a.csv", ["1_0"]))
