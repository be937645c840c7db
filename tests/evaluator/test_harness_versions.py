"""Logs of lm-evaluation-harness 0.4.0, 0.4.2 (arrays) and 0.4.3 (lines that don't name their
metrics), written by these versions of a tiny model, and what of them is not a number for each
document."""

import gzip
import json
import shutil

import numpy as np
import pytest
from reader_logs import LOGS, value

from llava_integration.evaluator.compare.aggregates import f1_of_labels, mcc_of_labels
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.sides import load_side

VERSIONS = ["0.4.0", "0.4.2", "0.4.3"]
NUMBERS = {  # of toy tasks, as the package printed them; 0.4.0 has no Brier score
    "toy_brier brier_score": -0.5050656124529374,
    "toy_cloze perplexity": -73.67366175446048,
    "toy_gen exact_match": 60,
    "toy_mc acc": 35,
    "toy_mcc mcc": -38.51644432598216,
    "toy_pairs f1": 13.333333333333334,
    "toy_text word_perplexity": -70.8239101550694,
}


@pytest.mark.parametrize("version", VERSIONS)
def test_numbers_are_those_that_were_printed(version):
    side = load_side(LOGS / f"lm_eval_{version}")
    expected = set(NUMBERS)
    if version == "0.4.0":
        expected.remove("toy_brier brier_score")
    assert set(side.runs) == expected
    assert side.notes == ()
    for name, (run,) in side.runs.items():
        assert value(side, name) == pytest.approx(NUMBERS[name], rel=1e-6), name
        assert run.printed is not None
        assert not any("another way" in note for note in run.notes)
        assert run.model == "tiny"


@pytest.mark.parametrize("version", VERSIONS)
def test_questions_and_answers_are_there(version):
    """An option that was found most likely, or a text; a text that was given is no answer."""
    side = load_side(LOGS / f"lm_eval_{version}")
    item = side.runs["toy_mc acc"][0].items[1]
    assert item["question"] == "Which of the two is 1?"
    assert (item["answer"], item["cluster"]) == ("sat", "im0")
    assert item["truth"] == "sat"
    assert item["choices"] == ["mat", "sat"]
    assert side.runs["toy_gen exact_match"][0].items[1]["answer"] == "??"
    assert "answer" not in side.runs["toy_text word_perplexity"][0].items[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_filters_have_their_names(version):
    """Up to 0.4.2 the lines don't name them: one "?" is never right, two are."""
    log = LOGS / f"lm_eval_{version}"
    (run,) = load_side(log).runs["toy_gen exact_match"]
    assert run.notes == ["filter strict of strict, word"]
    chosen = load_side(log, choices=Choices(filter="word"))
    (run,) = chosen.runs["toy_gen exact_match"]
    assert run.statistic.full() == 0
    assert run.printed == 0
    assert len(run.ids) == 10


def test_versions_are_compared_with_each_other():
    sides = [load_side(LOGS / f"lm_eval_{name}", name) for name in VERSIONS]
    rows = build(sides).rows
    assert {row.benchmark for row in rows} == set(NUMBERS) - {"toy_brier brier_score"}
    assert all(row.result.difference == pytest.approx(0) for row in rows)


def test_any_name_of_the_file_of_results_and_json_for_jsonl(tmp_path):
    """--output_path runs/first.json; a log that somebody called .json, or packed."""
    folder = LOGS / "lm_eval_0.4.2"
    shutil.copy(folder / "results.json", tmp_path / "first.json")
    log = folder / "pretrained__tiny_toy_mc.jsonl"
    shutil.copy(log, tmp_path / "pretrained__tiny_toy_mc.json")
    (run,) = load_side(tmp_path).runs["toy_mc acc"]
    assert (run.model, run.printed, run.statistic.full()) == ("tiny", 0.35, 35)
    (tmp_path / "pretrained__tiny_toy_mc.json").unlink()
    packed = tmp_path / "pretrained__tiny_toy_mc.jsonl.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    (run,) = load_side(tmp_path).runs["toy_mc acc"]
    assert (run.model, run.printed, run.statistic.full()) == ("tiny", 0.35, 35)


def test_a_new_log_that_is_called_json(tmp_path):
    for path in (LOGS / "lm_eval_0.4.3").iterdir():
        if "toy_mc_" in path.name or path.name.startswith("results"):
            shutil.copy(path, tmp_path / path.name.replace(".jsonl", ".json"))
    (run,) = load_side(tmp_path).runs["toy_mc acc"]
    assert (run.model, run.printed, run.statistic.full()) == ("tiny", 0.35, 35)


def test_a_difference_in_f1_is_found(tmp_path):
    """20 of 40 positives are found by one side, 36 by the other, each with 4 false ones."""
    for name, hits in (("base", 20), ("new", 36)):
        lines = []
        for n in range(80):
            truth = int(n < 40)
            answer = int(n < hits) if truth else int(n >= 76)
            about = {"doc_id": n, "doc_hash": "h", "metrics": ["f1"]}
            lines.append({**about, "f1": [truth, answer]})
        (tmp_path / name).mkdir()
        log = tmp_path / name / "samples_mrpc_2026-11-28T21-57-04.1.jsonl"
        log.write_text("\n".join(map(json.dumps, lines)))
    (row,) = build([load_side(tmp_path / name) for name in ("base", "new")]).rows
    assert row.result.base == pytest.approx(100 * 40 / 64)
    assert row.result.new == pytest.approx(100 * 72 / 80)
    assert (row.unit, row.verdict) == ("F1", "better")


def test_f1_and_matthews_correlation_by_hand():
    """3 of 4 positives, 1 of 4 negatives taken for one; and three labels, of which one is never
    answered."""
    pairs = [(1, 1)] * 3 + [(1, 0)] + [(0, 1)] + [(0, 0)] * 3
    items = [{"label": truth, "parsed": answer} for truth, answer in pairs]
    assert f1_of_labels(items).full() == pytest.approx(75)
    assert mcc_of_labels(items).full() == pytest.approx(50)
    pairs = [(0, 0), (0, 0), (1, 1), (1, 0), (2, 1), (2, 0)]
    items = [{"label": truth, "parsed": answer} for truth, answer in pairs]
    covariance = 3 * 6 - (2 * 4 + 2 * 2)  # 3 of 6 are right
    spread = np.sqrt((36 - 12) * (36 - 20))  # truths 2, 2, 2; answers 4, 2
    assert mcc_of_labels(items).full() == pytest.approx(100 * covariance / spread)
    assert mcc_of_labels(items[:2]).full() == 0
