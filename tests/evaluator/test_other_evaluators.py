"""Logs of HELM, lighteval, OpenCompass and EvalScope, written by two versions of each (``logs/``),
become the numbers that they print."""

import json
import re
import shutil
import sys

import pytest
from reader_logs import LOGS, value

from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.page import disagreements
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.readers.helm import main_metric
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.installation import MissingExtraError

HELM = "custom_mcqa,path=toy.jsonl,method=multiple_choice_joint"
HELM += ":data_augmentation=misspelling0.05"


def the_run(path, benchmark, **choices):
    (run,) = load_side(path, choices=Choices(**choices)).runs[benchmark]
    return run


@pytest.mark.parametrize("version", ["0.5.4", "0.5.16"])
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


@pytest.mark.parametrize(
    ("groups", "metrics", "main"),
    [
        (["mmlu"], ["quasi_exact_match", "exact_match"], "exact_match"),
        (["boolq"], ["exact_match", "quasi_exact_match"], "quasi_exact_match"),
        (["narrative_qa"], ["exact_match", "bleu_4", "f1_score"], "f1_score"),
        (["bbq"], ["exact_match", "quasi_exact_match", "bbq_accuracy"], "bbq_accuracy"),
        (["gsm"], ["exact_match_indicator", "exact_match"], "exact_match_indicator"),
        (["msmarco_trec"], ["RR@10", "NDCG@10"], "NDCG@10"),
        (["mmlu_clinical", "unknown"], ["num_references"], ""),
    ],
)
def test_the_main_metric_of_helm_is_its_leaderboards(groups, metrics, main):
    assert main_metric(groups, metrics) == main


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


# what is damaged, the tasks that are compared all the same, and what a note says
CUT = {
    "results": ({"toy_ppl accuracy", "toy_qa accuracy"}, "left out: "),
    "predictions": (
        {"toy_mcq accuracy", "toy_ppl accuracy", "toy_qa accuracy"},
        "questions may lack their texts: ",
    ),
}


@pytest.mark.parametrize("folder", CUT)
def test_a_file_of_opencompass_that_was_cut_is_said(tmp_path, folder):
    """Where it stops; running it again with another option would not help."""
    tasks, start = CUT[folder]
    shutil.copytree(LOGS / "opencompass" / "0.5.4", tmp_path / "run")
    path = tmp_path / "run" / folder / "org-toy" / "toy_mcq.json"
    path.write_text(path.read_text()[:200])
    side = load_side(tmp_path)
    assert set(side.runs) == tasks
    notes = list(side.notes)
    for runs in side.runs.values():
        notes += runs[0].notes
    (note,) = notes
    assert note.startswith(f"{start}{path} is not valid JSON (")
    assert re.search(r"line \d+ column \d+.*the file is damaged", note)
    if folder == "results":
        with pytest.raises(ContractError, match="the file is damaged"):
            load_side(path)


EVALSCOPE = {
    "0.17.1": "general_mcq AverageAccuracy",
    "1.1.0": "general_mcq acc",
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


LIGHTEVAL = {  # of a version: model, and the id of the question with the number 5
    "0.8.1": ("dummy", "e1ee75dfc043"),  # without ids: the question stands for it
    "0.13.0": ("org/dummy", "5"),
}


@pytest.mark.parametrize("version", LIGHTEVAL)
def test_lighteval(version):
    """9 of 20 questions by likelihood; 1 of 10 that are answered alike."""
    pytest.importorskip("pyarrow")
    side = load_side(LOGS / "lighteval" / version)
    assert {name: value(side, name) for name in side.runs} == {
        "toy_gen|0 em": pytest.approx(10),
        "toy_mc|0 acc": pytest.approx(45),
    }
    model, five = LIGHTEVAL[version]
    for (run,) in side.runs.values():
        assert run.notes == []
        assert run.printed == pytest.approx(run.statistic.full() / 100)
        assert run.model == model
    (run,) = side.runs["toy_mc|0 acc"]
    item = dict(zip(run.ids, run.items, strict=True))[five]
    assert item["question"] == "Which of the two is 5?"
    assert (item["truth"], item["answer"]) == ([" that"], "that")
    (run,) = side.runs["toy_gen|0 em"]
    assert run.items[0]["answer"] == "random baseline"
    chosen = load_side(LOGS / "lighteval" / version / "details", choices=Choices())
    assert chosen.runs["toy_mc|0 acc"][0].scores == side.runs["toy_mc|0 acc"][0].scores


def test_lighteval_needs_pyarrow(monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match="pip install pyarrow"):
        load_side(LOGS / "lighteval" / "0.13.0")


def test_the_average_of_lightevals_subsets_is_one_row(tmp_path):
    """Each subset has equal weight; a metric of which less is better is negated."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    date = "2026-12-01T18-34-55.730984"
    details = tmp_path / "details" / "org" / "m" / date
    details.mkdir(parents=True)
    rights = {"anatomy": [1, 1, 0, 0], "law": [1] * 9 + [0]}
    for subset, scores in rights.items():
        rows = []
        for number, score in enumerate(scores):
            doc = {"id": str(number), "query": "?", "choices": ["a"], "gold_index": 0}
            response = {"text": ["a"], "logprobs": []}
            metric = {"acc": score, "wer": 1 - score}
            rows.append({"doc": doc, "metric": metric, "model_response": response})
        name = f"details_mmlu:{subset}|5_{date}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), details / name)
    entry = {"metric_name": "wer", "higher_is_better": False}
    body = {
        "config_general": {"model_name": "org/m"},
        "results": {"mmlu:_average|5": {"acc": 0.7}, "mmlu:law|5": {"wer": 0.1}},
        "config_tasks": {"mmlu:law|5": {"metrics": [entry]}},
    }
    results = tmp_path / "results" / "org" / "m"
    results.mkdir(parents=True)
    (results / f"results_{date}.json").write_text(json.dumps(body))
    run = the_run(tmp_path, "mmlu|5 acc")
    assert run.statistic.full() == pytest.approx(70)
    assert run.notes == []
    assert len(run.ids) == 14
    log = details / f"details_mmlu:law|5_{date}.parquet"
    run = the_run(log, "mmlu:law|5 wer", metric="wer")
    assert run.statistic.full() == pytest.approx(-0.1 * run.scale)
    assert run.notes == ["wer: lower is better, so its negative is compared"]


@pytest.mark.parametrize("version", ["0.3.60", "0.3.285"])
def test_questions_of_inspect_ai_may_be_messages(version):
    """The user's is the question. Images are in the metadata, which older summaries lack."""
    run = the_run(LOGS / "inspect_ai_chat" / version, "toy_chat match")
    assert run.statistic.full() == pytest.approx(50)
    assert run.printed == 0.5
    assert run.model == "toy/small"
    item = dict(zip(run.ids, run.items, strict=True))["q1"]
    assert (item["question"], item["answer"]) == ("Is 1 even?", "yes")
    assert item["cluster"] == "im0"
    assert len(set(run.clusters)) == 4


FORMATS = (
    "lm_eval",
    "lm_eval_0.4.2",
    "lm_eval_0.4.3",
    "lmms_eval/today",
    "lmms_eval_0.2.0",
    "vlmevalkit",
    "vlmevalkit_old",
    "inspect_ai",
    "helm/0.5.16",
    "opencompass/0.3.9",
    "opencompass/0.5.4",
    "evalscope/0.17.1",
    "evalscope/1.14.1",
)


@pytest.mark.parametrize("folder", FORMATS)
def test_where_sides_disagree_every_log_has_something_to_show(folder):
    """Each question with its answers, but for texts whose likelihood is the score."""
    side = load_side(LOGS / folder)
    for name, (run, *_) in side.runs.items():
        if "perplexity" in name:
            continue
        other = [{**item, "score": item["score"] - 1} for item in run.items]
        pairs = disagreements(run.items, other, 3)
        assert pairs, name
        for item, _ in pairs:
            assert item["question"], name
            assert isinstance(item["answer"], str), name


DAMAGED = {  # a file of a log: what is written there
    "helm/0.5.16/toy_run/per_instance_stats.json": '[{"instance_id": "id0", "stats": [',
    "helm/0.5.16/toy_run/run_spec.json": "{}",
    "helm/0.5.16/toy_run/stats.json": '[{"name": "exact_match"}]',
    "opencompass/0.5.4/results/org-toy/toy_mcq.json": '{"accuracy": 1, "details": [{}]}',
    "evalscope/1.14.1/reviews/org-toy/general_qa_default.jsonl": '{"sample_score": {}}',
    "evalscope/1.14.1/reports/org-toy/general_qa.json": '{"metrics": [{}]}',
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_file_is_a_note_or_one_line(tmp_path, damaged):
    folder, version, *parts = damaged.split("/")
    shutil.copytree(LOGS / folder / version, tmp_path / "logs")
    path = tmp_path.joinpath("logs", *parts)
    path.write_text(DAMAGED[damaged])
    try:
        message = "; ".join(load_side(tmp_path).notes)
    except ContractError as error:
        message = str(error)
    assert path.name in message
    assert "\n" not in message


def test_a_question_that_lighteval_asked_twice_counts_once_in_the_interval(tmp_path):
    """Its answers go together: twenty copies are no twenty questions."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    name = next((LOGS / "lighteval" / "0.13.0").rglob("*toy_mc*.parquet"))
    rows = parquet.read_table(name).to_pylist()
    copies = [row for row in rows for _ in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(copies), tmp_path / name.name)
    run = the_run(tmp_path, "toy_mc|0 acc")
    assert len(run.ids) == 20 * len(rows)
    assert len(set(run.clusters)) == len(rows)


def test_one_split_of_a_helm_run_is_compared(tmp_path):
    """The test split, whose number is printed; not the mean of it and the valid one."""
    shutil.copytree(LOGS / "helm" / "0.5.16" / "toy_run", tmp_path / "run")
    path = tmp_path / "run" / "per_instance_stats.json"
    instances = json.loads(path.read_text())
    for instance in json.loads(path.read_text()):
        instance["instance_id"] = f"valid {instance['instance_id']}"
        for stat in instance["stats"]:
            stat["mean"] = 0.0
            stat["name"]["split"] = "valid"
        instances.append(instance)
    path.write_text(json.dumps(instances))
    run = the_run(tmp_path, f"{HELM} exact_match")
    assert run.statistic.full() == pytest.approx(100 * 8 / 12)
    assert run.notes == []
