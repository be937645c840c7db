"""Logs of HELM, OpenCompass and EvalScope, written by two versions of each (``logs/``), become the
numbers that they print."""

import json
import shutil

import pytest
from reader_logs import LOGS, value

from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.errors import ContractError

HELM = "custom_mcqa,path=toy.jsonl,method=multiple_choice_joint"
HELM += ":data_augmentation=misspelling0.05"


def the_run(path, benchmark, **choices):
    (run,) = load_side(path, choices=Choices(**choices)).runs[benchmark]
    return run


@pytest.mark.parametrize("version", ["0.5.16"])
def test_helm(version):
    """8 of 12 questions as they are; the misspelled ones do not count."""
    folder = LOGS / "helm" / version
    run = the_run(folder, f"{HELM} exact_match")
    assert run.statistic.full() == pytest.approx(100 * 8 / 12)
    assert run.printed == pytest.approx(8 / 12)
    assert run.notes == []
    assert run.model == "org/toy"
    item = dict(zip(run.ids, run.items, strict=True))["id1"]
    assert item["question"] == "Which of the two is 1? A or B"
    assert item["truth"] == ["this"]
    assert item["answer"] == "A. this"
    chosen = the_run(folder, f"{HELM} quasi_exact_match", metric="quasi_exact_match")
    assert chosen.scores == run.scores
    with pytest.raises(ContractError, match="no f1_score; choose with --metric: exact"):
        load_side(folder / "toy_run", choices=Choices(metric="f1_score"))


def test_a_helm_run_without_its_requests_has_no_texts(tmp_path):
    shutil.copytree(LOGS / "helm" / "0.5.16" / "toy_run", tmp_path / "run")
    (tmp_path / "run" / "scenario_state.json").unlink()
    run = the_run(tmp_path, f"{HELM} exact_match")
    assert run.statistic.full() == pytest.approx(100 * 8 / 12)
    assert "question" not in run.items[0]


@pytest.mark.parametrize("version", ["0.3.9", "0.5.4"])
def test_opencompass(version):
    """Options that are found in answers, answers that are equal, and likelihoods of options."""
    side = load_side(LOGS / "opencompass" / version)
    numbers = {name: value(side, name) for name in side.runs}
    assert numbers == {
        "toy_mcq accuracy": 50,
        "toy_ppl accuracy": 50,
        "toy_qa accuracy": pytest.approx(100 * 4 / 6),
    }
    for (run,) in side.runs.values():
        assert run.notes == []
        assert run.printed == pytest.approx(run.statistic.full())
        assert run.model == "org-toy"
    item = side.runs["toy_mcq accuracy"][0].items[1]
    assert item["question"] == "Which of the two is 1?\nA. this\nB. that\nAnswer:"
    assert (item["id"], item["truth"], item["answer"]) == ("1", "B", "A")


def test_versions_of_opencompass_are_compared():
    sides = [
        load_side(LOGS / "opencompass" / name, name) for name in ("0.3.9", "0.5.4")
    ]
    rows = build(sides).rows
    assert [row.questions for row in rows] == [8, 8, 6]
    assert all(row.result.difference == 0 for row in rows)


def test_opencompass_without_details_is_said(tmp_path):
    """Without --dump-eval-details there is no score for each question."""
    shutil.copytree(LOGS / "opencompass" / "0.5.4", tmp_path / "run")
    results = tmp_path / "run" / "results" / "org-toy" / "toy_mcq.json"
    results.write_text(json.dumps({"accuracy": 50.0}))
    side = load_side(tmp_path)
    assert set(side.runs) == {"toy_ppl accuracy", "toy_qa accuracy"}
    (note,) = side.notes
    assert "toy_mcq.json" in note
    assert "--dump-eval-details" in note


EVALSCOPE = {
    "0.17.1": "general_mcq AverageAccuracy",
    "1.14.1": "general_mcq accuracy",
}


@pytest.mark.parametrize("version", EVALSCOPE)
def test_evalscope(version):
    """Two subsets of 8 and 4 questions have one number, half of each are right."""
    run = the_run(LOGS / "evalscope" / version, EVALSCOPE[version])
    assert run.statistic.full() == 50
    assert run.printed == 0.5
    assert run.notes == []
    assert run.model == "org-toy"
    assert len(run.ids) == 12
    assert run.groups.count("general_mcq_other") == 4
    assert "Which of the two is 1?" in run.items[1]["question"]
    assert run.items[1]["truth"] in ("B", ["B"])
    assert run.items[1]["answer"] in ("A", "B")


def test_the_main_metric_of_several_of_evalscope():
    """ROUGE-L's recall, which the report has under another name."""
    folder = LOGS / "evalscope" / "1.14.1"
    run = the_run(folder, "general_qa Rouge-L-R")
    assert run.statistic.full() == pytest.approx(84)
    assert run.printed == pytest.approx(0.84)
    assert run.notes == []
    log = folder / "reviews" / "org-toy" / "general_qa_default.jsonl"
    run = the_run(log, "general_qa Rouge-1-F", metric="Rouge-1-F")
    assert run.statistic.full() == pytest.approx(71.21, abs=0.01)


def test_reviews_without_a_report_are_read(tmp_path):
    """Each subset is a task then."""
    shutil.copytree(LOGS / "evalscope" / "1.14.1" / "reviews", tmp_path / "reviews")
    side = load_side(tmp_path)
    assert set(side.runs) == {
        "general_mcq_default accuracy",
        "general_mcq_other accuracy",
        "general_qa_default Rouge-L-R",
    }
