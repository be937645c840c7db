"""VLMEvalKit's tables (``logs/``, written by it) become the numbers that it prints."""

import csv
import json

import openpyxl
import pytest
from reader_logs import LOGS, value

from llava_integration.evaluator.compare.comparison import load_side
from llava_integration.evaluator.compare.readers.lm_eval import ALONE

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
        assert side.runs[benchmark][0].notes == ([] if table.endswith("_score.csv") else [ALONE])


@pytest.mark.parametrize("ending", ["xlsx", "json"])
def test_vlmevalkit(tmp_path, ending):
    path = tmp_path / "model" / f"model_MMBench_DEV_EN_exact_matching_result.{ending}"
    path.parent.mkdir()
    rows = [{"index": n, "answer": "A", "prediction": "B", "hit": int(n < 3)} for n in range(4)]
    if ending == "json":
        path.write_text(json.dumps(rows))
    else:
        book = openpyxl.Workbook()
        for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.worksheets[0].append(row)
        book.save(path)
    (path.parent / "model_MMBench_DEV_EN_acc.csv").write_text('"split","Overall"\n"none","0.75"\n')
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
