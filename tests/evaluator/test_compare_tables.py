"""What people have: tables of a few columns, several models in one, folders of which one task can't
be read."""

import json
import re

import openpyxl
import pytest

from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.page import page
from llava_integration.evaluator.compare.sides import load_models, load_side
from llm2clip_plugin.errors import ContractError


def table(path, scores, head="item,score", more=""):
    lines = [head, *(f"{item},{score}{more}" for item, score in enumerate(scores))]
    path.write_text("\n".join(lines))
    return path


BASE = [0, 1, 0, 0] * 20
NEW = [1, 1, 0, 1] * 20


def test_two_tables_of_two_columns_are_compared(tmp_path, capsys):
    """Their names are the sides', not two tasks."""
    base = table(tmp_path / "base.csv", BASE)
    new = table(tmp_path / "new.csv", NEW, head="ID,Correct")
    assert main([str(base), str(new), "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "## new (new) against base (base)" in output
    assert "+50.00" in output
    assert "80 items" in output
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (row["benchmark"], row["verdict"]) == ("scores", "better")
    sides = [load_side(base), load_side(new)]
    assert "+50.00" in page(build(sides), sides)


@pytest.mark.parametrize("ending", ["CSV", "TSV", "JSONL", "XLSX", "json", "JSON"])
def test_the_ending_of_a_table_may_be_in_capitals(tmp_path, ending):
    rows = [{"item": item, "score": score} for item, score in enumerate(NEW)]
    path = tmp_path / f"a.{ending}"
    if ending == "XLSX":
        book = openpyxl.Workbook()
        for cells in [("item", "score"), *enumerate(NEW)]:
            book.active.append(cells)
        book.save(path)
    elif ending in ("CSV", "TSV"):
        separator = "," if ending == "CSV" else "\t"
        lines = [f"{row['item']}{separator}{row['score']}" for row in rows]
        path.write_text("\n".join([f"item{separator}score", *lines]))
    elif ending == "JSONL":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows, indent=1))
    ((run,),) = load_side(path).runs.values()
    assert run.scores == NEW


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"item": 1, "score": 1}, 5]', "a.json, row 2: expected an object, got 5"),
        ('[{"item": 1, "score": 1}, {"item"', "a.json is not valid JSON"),
        ('{"item": 1, "score": 1}', r"a table \(.*\.json with an array of rows\)"),
    ],
)
def test_a_json_table_that_cannot_be_read_is_named(tmp_path, text, problem):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises((ContractError, FileNotFoundError), match=problem):
        load_side(path)


def test_a_table_is_compared_with_the_only_task_of_a_log(tmp_path):
    log = tmp_path / "samples_toy_2026-11-28T21-57-04.1.jsonl"
    about = {"doc_hash": "h", "metrics": ["acc"]}
    lines = [
        json.dumps({"doc_id": n, **about, "acc": right}) for n, right in enumerate(NEW)
    ]
    log.write_text("\n".join(lines))
    (row,) = build([load_side(table(tmp_path / "base.csv", BASE)), load_side(log)]).rows
    assert row.benchmark == "toy acc"
    assert row.result.difference == pytest.approx(50)


def test_two_tables_of_two_tasks_are_not_compared(tmp_path):
    base = table(tmp_path / "base.csv", BASE, head="item,score,task", more=",x")
    new = table(tmp_path / "new.csv", NEW, head="item,score,task", more=",y")
    with pytest.raises(ValueError, match="no benchmark in common"):
        main([str(base), str(new)])


def test_a_column_of_models_makes_sides(tmp_path, capsys):
    lines = ["item,score,model,seed"]
    for model, scores in {"llava": BASE, "ours": NEW, "theirs": BASE}.items():
        for seed in (0, 1):
            lines += [
                f"{item},{score},{model},{seed}" for item, score in enumerate(scores)
            ]
    path = tmp_path / "all.csv"
    path.write_text("\n".join(lines))
    sides = load_models(path)
    assert [side.name for side in sides] == ["llava", "ours", "theirs"]
    assert all(len(side.runs["all"]) == 2 for side in sides)
    assert main([str(path)]) == 0
    output = capsys.readouterr().out
    assert "## ours (new) against llava (base)" in output
    assert "## theirs (new) against llava (base)" in output
    assert main([str(path), "--names", "a", "b", "c"]) == 0
    assert "## b (new) against a (base)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 --names for 3 models: llava, ours, theirs"):
        main([str(path), "--names", "a", "b"])
    with pytest.raises(ValueError, match="second side"):
        main([str(table(tmp_path / "one.csv", BASE))])


def test_logs_of_several_models_in_a_folder_are_sides_if_it_is_alone(tmp_path):
    for model, scores in {"llava": BASE, "ours": NEW}.items():
        table(
            tmp_path / f"{model}.csv",
            scores,
            head="item,score,task,model",
            more=f",x,{model}",
        )
    assert [side.name for side in load_models(tmp_path)] == ["llava", "ours"]
    with pytest.raises(ContractError, match="logs of 2 models"):
        load_side(tmp_path)


def test_ci_can_fail_on_worse(tmp_path):
    base = str(table(tmp_path / "base.csv", BASE))
    new = str(table(tmp_path / "new.csv", NEW))
    assert main([base, new, "--fail-on", "worse"]) == 0
    assert main([new, base, "--fail-on", "worse"]) == 4
    assert main([new, base]) == 0


UNREADABLE = {
    "a repeated item": "item,score,task\n1,0,b\n1,1,b\n",
    "a sample without a score": "item,score,task\n1,0,b\n2,,b\n",
    "an infinite score": "item,score,task\n1,0,b\n2,inf,b\n",
    "a line that was cut": "item,score,task\n1,0,b\n2,1",
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_one_task_that_cannot_be_read_is_a_note(tmp_path, fault, capsys):
    for name, scores in {"base": BASE, "new": NEW}.items():
        (tmp_path / name).mkdir()
        table(tmp_path / name / "a.csv", scores, head="item,score,task", more=",a")
        (tmp_path / name / "b.csv").write_text(UNREADABLE[fault])
    assert main([str(tmp_path / "base"), str(tmp_path / "new")]) == 0
    output = capsys.readouterr().out
    assert "+50.00" in output
    assert f"left out: {tmp_path / 'base' / 'b.csv'}" in output
    with pytest.raises(ContractError, match=r"b\.csv"):
        load_side(tmp_path / "base" / "b.csv")


def test_one_task_that_cannot_be_compared_is_a_note(tmp_path):
    """Half of its items are in common; --min-overlap takes these."""
    lines = {"base": ["item,score,task"], "new": ["item,score,task"]}
    for name, scores in {"base": BASE, "new": NEW}.items():
        start = 40 if name == "new" else 0
        for item, score in enumerate(scores):
            lines[name] += [f"{item},{score},a", f"{start + item},{score},b"]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines[name]))
    sides = [load_side(tmp_path / f"{name}.csv") for name in ("base", "new")]
    comparison = build(sides)
    assert [row.benchmark for row in comparison.rows] == ["a"]
    (note,) = comparison.notes
    assert "not compared: b: base and new share 40 questions of 80, 80" in note
    rows = build(sides, min_overlap=0.5).rows
    assert [(row.benchmark, row.questions) for row in rows] == [("a", 80), ("b", 40)]
    assert page(build(sides, min_overlap=0.5), sides)


def test_samples_of_inspect_ai_without_a_score_are_left_out(tmp_path):
    samples = [
        {"id": n, "epoch": 1, "target": "x", "scores": {"match": {"value": grade}}}
        for n, grade in enumerate("CCI")
    ]
    samples.append({"id": 3, "epoch": 1, "target": "x", "error": "out of memory"})
    log = {
        "version": 2,
        "status": "success",
        "eval": {"run_id": "x", "task": "toy", "dataset": {"samples": 4}},
        "results": {"scores": [{"name": "match", "scorer": "match"}]},
        "samples": samples,
    }
    (tmp_path / "log.json").write_text(json.dumps(log))
    (run,) = load_side(tmp_path / "log.json").runs["toy match"]
    assert run.scores == [1, 1, 0]
    assert run.notes == ["toy: 1 samples have no score of match; left out"]


@pytest.mark.parametrize("first", [{}, {"group": None}, {"group": ""}], ids=str)
def test_a_row_without_a_group_loses_no_other_groups(tmp_path, first):
    rows = [{"item": 0, "score": 1, **first}]
    rows += [
        {"item": number, "score": 1, "group": number // 4} for number in range(1, 8)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    ((run,),) = load_side(path).runs.values()
    assert run.clusters == ["0", "0", "0", "0", "1", "1", "1", "1"]


def test_a_table_with_a_chosen_metric_needs_no_score(tmp_path, capsys):
    base = table(tmp_path / "base.csv", BASE, head="item,f1")
    new = table(tmp_path / "new.csv", NEW, head="item,f1")
    assert main([str(base), str(new), "--metric", "f1"]) == 0
    assert "+50.00" in capsys.readouterr().out
    with pytest.raises(
        FileNotFoundError,
        match=r"a table \(\.csv, .*\) needs the columns item and score",
    ):
        main([str(base), str(new)])


@pytest.mark.parametrize(
    ("first", "second", "sides"),
    [
        ("llava-seed1", "llava-seed2", 1),
        ("llava_run1_best", "llava_run2_best", 1),
        ("pretrained=a,seed=1", "pretrained=a,seed=2", 1),
        ("doubao-seed-1", "doubao-seed-2", 2),
        ("seed1.5-vl", "seed1.6-vl", 2),
        ("llava-seed1", "ours-seed1", 2),
    ],
)
def test_seeds_of_a_model_and_models(tmp_path, first, second, sides):
    lines = ["item,score,model"]
    for model in (first, second):
        lines += [f'{item},{score},"{model}"' for item, score in enumerate(BASE)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    assert len(load_models(path)) == sides


def test_the_first_row_of_a_jsonl_table_need_not_have_all_columns(tmp_path):
    """It is a table, and the row that lacks the score is named."""
    rows = [{"item": 0, "note": "skipped"}, {"item": 1, "score": 1}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ContractError, match=r"a\.jsonl, line 1: score is None"):
        load_side(path)
    rows = [{"score": 1, "item": 0}, {"item": 1, "score": 1, "group": "g"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    (run,) = load_side(path).runs["a"]
    assert run.scores == [1, 1]


def test_a_score_has_no_unit(tmp_path):
    """What is detectable is a number alone, as in the table."""
    scores = [number % 7 for number in range(80)]
    other = [number % 5 for number in range(80)]
    sides = [
        load_side(table(tmp_path / "base.csv", scores)),
        load_side(table(tmp_path / "new.csv", other)),
    ]
    (row,) = build(sides).rows
    assert row.unit == "score"
    assert re.search(r"a difference of \d\.\d\d is detectable", row.power_line())


def test_a_task_on_two_scales_is_a_note(tmp_path):
    """The other task is compared; alone it is an error."""
    for name, most in (("base", 1), ("new", 100)):
        lines = ["item,score,task"]
        for item, score in enumerate(BASE):
            lines += [f"{item},{score},a", f"{item},{most * score},b"]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    comparison = build(
        [load_side(tmp_path / f"{name}.csv") for name in ("base", "new")]
    )
    assert [row.benchmark for row in comparison.rows] == ["a"]
    (note,) = comparison.notes
    assert note.startswith(
        "not compared: scores on b are at most 1 in base and go to 100"
    )
