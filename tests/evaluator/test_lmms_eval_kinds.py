"""lmms-eval's boxes, MLVU, HR-Bench and MathVista (``true_false``) become the numbers that it
prints. Written by 0.7.3, of its tasks' own functions on toy questions."""

import json

import pytest
from reader_logs import LOGS, value

from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.readers.lmms_eval import (
    intersection_over_union,
)
from llava_integration.evaluator.compare.sides import load_side

KINDS = LOGS / "lmms_eval" / "kinds"
NUMBERS = {
    "toy_hrbench average": 50,  # mean over 4 rotations, of 4, 1, 2 and 4 questions
    "toy_mathvista llm_as_judge_eval": 50,
    "toy_mlvu mlvu_percetion_score": 100 * 10 / 21,  # mean over 7 kinds of questions
    "toy_refcoco refcoco_IoU": 73.43277665317138,
}


def test_numbers_are_those_that_were_printed():
    side = load_side(KINDS)
    assert {name: value(side, name) for name in side.runs} == pytest.approx(NUMBERS)
    for (run,) in side.runs.values():
        assert run.printed is not None
        assert not any("another way" in note for note in run.notes)
        assert run.items[0]["answer"]
        assert run.items[0]["question"]


@pytest.mark.parametrize("metric", ["ACC@0.5", "Center_ACC"])
def test_other_metrics_of_boxes(metric):
    (log,) = KINDS.glob("*refcoco.jsonl")
    chosen = load_side(log, choices=Choices(metric=f"refcoco_{metric}"))
    (run,) = chosen.runs[f"toy_refcoco refcoco_{metric}"]
    assert run.notes == [note for note in run.notes if "another way" not in note]
    assert run.statistic.full() == pytest.approx(100 * run.printed)


def test_boxes_by_hand():
    assert intersection_over_union([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert intersection_over_union([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    assert intersection_over_union([0, 0, 0, 0], [0, 0, 0, 0]) == 0


def test_a_box_is_never_compared_as_a_text(tmp_path):
    """Of a metric that nobody knows, instead of calling every answer wrong."""
    value = {"answer": "a dog", "pred": [0, 0, 1, 1], "bbox": [0, 0, 1, 1]}
    line = {"doc_id": 0, "doc_hash": "h", "refcoco_other": value}
    path = tmp_path / "20250101_000000_samples_refcoco.jsonl"
    path.write_text(json.dumps(line))
    (tmp_path / "20250101_000000_samples_a.jsonl").write_text(
        json.dumps({"doc_id": 0, "doc_hash": "h", "acc": 1})
    )
    (note,) = load_side(tmp_path).notes
    assert "none of the metrics refcoco_other of refcoco has a number" in note


def test_lmms_eval_up_to_0_2_2_wrote_an_object_for_each_task():
    """TASK.json next to results.json, by 0.2.0; POPE's image is in the document."""
    side = load_side(LOGS / "lmms_eval_0.2.0")
    assert {name: value(side, name) for name in side.runs} == {
        "pope": pytest.approx(50),
        "toy_mathvista gpt_eval_score": 50,
    }
    for (run,) in side.runs.values():
        assert run.model == "org/toy"
        assert run.printed is not None
        assert not any("another way" in note for note in run.notes)
    (run,) = side.runs["pope"]
    assert len(set(run.clusters)) == 6
    assert run.items[0]["question"] == "Is there a 0?"
    assert run.items[0]["answer"] == "Yes"


@pytest.mark.parametrize("task", ["mme", "mmvp mmvp_pair_accuracy", "mmbench"])
def test_composites_have_texts_to_show(task):
    side = load_side(LOGS / "lmms_eval" / "today")
    (run,) = side.runs[task]
    for item in run.items:
        assert item["question"]
        assert "answer" in item
    if task == "mmbench":
        assert len(run.items[0]["rows"]) > 1
