"""VLMEvalKit's tables (``logs/``, written by it) become the numbers that it prints."""

import csv
import json

import openpyxl
import pytest
from reader_logs import LOGS, value

from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.readers.harness_lines import ALONE
from llava_integration.evaluator.compare.sides import load_side

SHARES = ("MMBench_DEV_EN", "AI2D_TEST", "MMVP")


PERCENT = ("ChartQA_TEST", "DocVQA_VAL", "TextVQA_VAL", "GQA_TestDev_Balanced")


VLMEVALKIT = {  # benchmark: what VLMEvalKit wrote, in a column of which table
    **{name: (f"toy_{name}_acc.csv", "Overall") for name in (*SHARES, *PERCENT)},
    "pope": ("toy_POPE_score.csv", "Overall"),
    "mme": ("toy_MME_score.csv", "perception"),
    "MME cognition": ("toy_MME_score.csv", "reasoning"),
}


def test_vlmevalkits_own_tables():
    """Written by its evaluation (e8e78f0) of toy predictions."""
    side = load_side(LOGS / "vlmevalkit")
    assert set(side.runs) == set(VLMEVALKIT)
    for benchmark, (table, column) in VLMEVALKIT.items():
        with (LOGS / "vlmevalkit" / "toy" / table).open() as file:
            printed = float(next(csv.DictReader(file))[column])
        assert value(side, benchmark) == pytest.approx(
            printed * 100 if benchmark in SHARES else printed
        ), benchmark
        notes = [ALONE]
        if table.endswith("_score.csv"):
            notes = []
        if benchmark == "pope":
            notes = ["60 questions, each counted in all of its parts"]
        assert side.runs[benchmark][0].notes == notes


@pytest.mark.parametrize("ending", ["xlsx", "json"])
def test_vlmevalkit(tmp_path, ending):
    path = tmp_path / "model" / f"model_MMBench_DEV_EN_exact_matching_result.{ending}"
    path.parent.mkdir()
    rows = [
        {"index": n, "answer": "A", "prediction": "B", "hit": int(n < 3)}
        for n in range(4)
    ]
    if ending == "json":
        path.write_text(json.dumps(rows))
    else:
        book = openpyxl.Workbook()
        for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.worksheets[0].append(row)
        book.save(path)
    (path.parent / "model_MMBench_DEV_EN_acc.csv").write_text(
        '"split","Overall"\n"none","0.75"\n'
    )
    assert value(load_side(path.parent), "MMBench_DEV_EN") == 75


def test_vlmevalkits_pope_counts_a_question_in_each_of_its_parts(tmp_path):
    """By hand, over six counted questions: two right "yes", one wrong "yes", one missed: F1 is 4 /
    6."""
    folder = tmp_path / "model"
    folder.mkdir()
    rows = [
        ("Yes", "Yes", "random,popular"),
        ("Yes", "No", "random"),
        ("No", "Yes", "popular"),
        ("No", "No", "a,b"),
    ]
    lines = [
        f"{n}\tp\t{true}\t{said}\t{true == said}\t{parts}"
        for n, (true, said, parts) in enumerate(rows)
    ]
    head = "index\tprediction\tanswer\textracted\tscore\tcategory"
    (folder / "model_POPE_auxmatch.tsv").write_text("\n".join([head, *lines]))
    assert value(load_side(folder), "pope") == pytest.approx(100 * 4 / 6)


def vlmevalkit_table(folder, name, head, rows):
    """A judged table of VLMEvalKit."""
    folder.mkdir()
    lines = ["\t".join(map(str, row)) for row in (head, *rows)]
    (folder / f"{folder.name}_{name}.tsv").write_text("\n".join(lines))


def test_vlmevalkits_splits_have_a_number_each(tmp_path):
    """MMMU_DEV_VAL: 3 of 4 of dev, 2 of 8 of validation; no number of both is printed."""
    rows = []
    for n in range(12):
        rows.append(
            [n, "A", "A", "dev" if n < 4 else "validation", int(n in (0, 1, 2, 4, 5))]
        )
    folder = tmp_path / "model"
    vlmevalkit_table(
        folder,
        "MMMU_DEV_VAL_openai_result",
        ["index", "prediction", "answer", "split", "hit"],
        rows,
    )
    printed = "split,Overall\ndev,0.75\nvalidation,0.25\n"
    (folder / "model_MMMU_DEV_VAL_acc.csv").write_text(printed)
    side = load_side(folder)
    assert {name: value(side, name) for name in side.runs} == {
        "MMMU_DEV_VAL dev": 75,
        "MMMU_DEV_VAL validation": 25,
    }
    assert all(run.notes == [ALONE] for (run,) in side.runs.values())
    (folder / "model_MMMU_DEV_VAL_acc.csv").write_text(printed.replace("0.25", "0.5"))
    (run,) = load_side(folder).runs["MMMU_DEV_VAL validation"]
    assert any("printed 0.5" in note for note in run.notes)


def test_vlmevalkits_pope_without_images_claims_none(tmp_path):
    """Questions in three parts are one question each; that they have an image each, nobody says."""
    rows = [
        [n, "Yes", "Yes", "Yes", "True", "random,popular,adversarial"] for n in range(4)
    ]
    head = ["index", "prediction", "answer", "extracted", "score", "category"]
    vlmevalkit_table(tmp_path / "model", "POPE_auxmatch", head, rows)
    side = load_side(tmp_path / "model")
    (run,) = side.runs["pope"]
    assert run.notes == [ALONE, "4 questions, each counted in all of its parts"]
    (row,) = build([side, side]).rows
    assert "12 items in 4 clusters" in row.power_line()
    assert "image" not in row.power_line()


def test_questions_about_one_video_go_together(tmp_path):
    rows = [[n, "A", "A", 1, f"video {n // 3}"] for n in range(6)]
    head = ["index", "prediction", "answer", "score", "videoID"]
    vlmevalkit_table(tmp_path / "model", "Video-MME_score", head, rows)
    (run,) = load_side(tmp_path / "model").runs["Video-MME"]
    assert len(set(run.clusters)) == 2
    assert run.notes == []


def excel(path, rows):
    book = openpyxl.Workbook()
    for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
        book.worksheets[0].append(row)
    book.save(path)


def test_tables_that_a_judge_is_named_by_are_read_and_unjudged_ones_noted(tmp_path):
    """MMVet's is MODEL_MMVet_JUDGE.xlsx; of a table without a score there is a note, unless its
    judged one is there."""
    folder = tmp_path / "gpt-4o"
    folder.mkdir()
    answers = [{"index": n, "answer": "A", "prediction": "B"} for n in range(4)]
    judged = [{**answer, "score": n / 4} for n, answer in enumerate(answers)]
    excel(folder / "gpt-4o_MMVet.xlsx", answers)
    excel(folder / "gpt-4o_MMVet_gpt-4-turbo.xlsx", judged)
    excel(folder / "gpt-4o_MathVista_MINI.xlsx", answers)
    side = load_side(folder)
    assert value(side, "MMVet") == pytest.approx(37.5)
    (note,) = side.notes
    assert "gpt-4o_MathVista_MINI.xlsx has answers but none of the scores" in note


OLD = {  # benchmark: a number by hand
    "COCO_VAL": 203.44,
    "ChartQA_TEST": 60,
    "DocVQA_VAL": None,
    "GQA_TestDev_Balanced": 50,
    "OCRBench": 60,
    "TextVQA_VAL": 70,
}


def test_old_folders_whose_tables_have_no_scores():
    """Written by its evaluation (of ms-vlmeval 0.0.20), without the tables of results, which older
    versions did not write."""
    side = load_side(LOGS / "vlmevalkit_old")
    assert set(side.runs) == set(OLD)
    assert side.notes == ()
    for benchmark, expected in OLD.items():
        (run,) = side.runs[benchmark]
        number = run.statistic.full()
        assert run.printed * 100 == pytest.approx(number, rel=1e-6), benchmark
        if expected is not None:
            assert number == pytest.approx(expected, abs=0.01), benchmark
        assert any(benchmark in note for note in run.notes)
        assert run.model == "toy"
        assert run.items[0]["answer"]
    assert len({*side.runs["DocVQA_VAL"][0].scores}) > 2
    assert side.runs["COCO_VAL"][0].unit == "CIDEr"


def test_whoever_the_judge_is_the_answers_are_read_once(tmp_path):
    """MODEL_MMVet_qwen-72b.xlsx next to the answers is MMVet; without a judge, MMBench's answers
    are not taken for judged because MMBench_DEV_EN's are."""
    folder = tmp_path / "m"
    folder.mkdir()
    answers = [{"index": n, "answer": "A", "prediction": "B"} for n in range(4)]
    judged = [{**answer, "score": n / 4} for n, answer in enumerate(answers)]
    excel(folder / "m_MMVet.xlsx", answers)
    excel(folder / "m_MMVet_qwen-72b.xlsx", judged)
    excel(folder / "m_MMBench.xlsx", answers)
    excel(folder / "m_MMBench_DEV_EN.xlsx", answers)
    excel(folder / "m_MMBench_DEV_EN_openai_result.xlsx", judged)
    side = load_side(folder)
    assert set(side.runs) == {"MMVet", "MMBench_DEV_EN"}
    (note,) = side.notes
    assert "m_MMBench.xlsx has answers but none of the scores" in note


@pytest.mark.parametrize("ending", ["tsv", "json"])
def test_answers_without_a_score_are_noted_in_every_format(tmp_path, ending):
    folder = tmp_path / "m"
    answers = [[n, "A", "B"] for n in range(4)]
    head = ["index", "answer", "prediction"]
    vlmevalkit_table(folder, "MMBench_score", [*head, "hit"], [[0, "A", "A", 1]])
    path = folder / f"m_MathVista_MINI.{ending}"
    if ending == "tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [head, *answers]))
    else:
        path.write_text(
            json.dumps([dict(zip(head, row, strict=True)) for row in answers])
        )
    (note,) = load_side(folder).notes
    assert f"m_MathVista_MINI.{ending} has answers but none of the scores" in note
