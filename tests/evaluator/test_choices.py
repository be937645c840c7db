"""--group, --metric, --filter and --scorer: what is read of a log that has several."""

import json

import pytest

from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.errors import ContractError

DATE = "2026-11-28T21-57-04.1"


@pytest.fixture
def harness(tmp_path):
    """A log of the harness with two metrics and two filters; right: the document's number is odd,
    with acc_norm and the filter flexible also every fourth."""
    lines = []
    for number in range(8):
        odd = number % 2
        also = int(odd or number % 4 == 0)
        about = {
            "doc_id": number,
            "doc": {"video": f"v{number // 4}"},
            "doc_hash": "a",
            "metrics": ["acc", "acc_norm"],
        }
        lines.append({**about, "filter": "strict", "acc": odd, "acc_norm": also})
        lines.append({**about, "filter": "flexible", "acc": also, "acc_norm": also})
    path = tmp_path / f"samples_toy_{DATE}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def the_run(path, **choices):
    ((run,),) = load_side(path, choices=Choices(**choices)).runs.values()
    return run


def test_metric_and_filter_of_the_harness(harness):
    assert sum(the_run(harness).scores) == 4
    normalized = the_run(harness, metric="acc_norm")
    assert normalized.benchmark == "toy acc_norm"
    assert sum(normalized.scores) == 6
    assert sum(the_run(harness, filter="flexible").scores) == 6
    with pytest.raises(ContractError, match="no filter loose; it has strict, flexible"):
        the_run(harness, filter="loose")
    with pytest.raises(ContractError, match=r"metrics f1 of toy.*acc, acc_norm"):
        the_run(harness, metric="f1")


def test_group_of_the_harness(harness):
    harness_lines = harness.read_text().replace('"video"', '"clip"')
    harness.write_text(harness_lines)
    assert len(set(the_run(harness).clusters)) == 8
    assert len(set(the_run(harness, group="clip").clusters)) == 2
    with pytest.raises(
        ContractError, match="line 1: no field movie for --group; fields: doc_id"
    ):
        the_run(harness, group="movie")


def test_group_and_metric_of_a_table(tmp_path, capsys):
    lines = ["item,score,strict,scene", *(f"{n},{n % 2},0,{n // 4}" for n in range(8))]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    assert len(set(the_run(path, group="scene").clusters)) == 2
    assert the_run(path, metric="strict").scores == [0] * 8
    with pytest.raises(ContractError, match="no column film; its columns: item, score"):
        the_run(path, group="film")
    assert main([str(path), str(path), "--group", "scene"]) == 0
    assert "8 items in 2 clusters" in capsys.readouterr().out


def test_scorer_of_inspect_ai(tmp_path):
    samples = []
    for n in range(4):
        scores = {"match": {"value": "C"}, "judge": {"value": n % 2}}
        metadata = {"page": f"p{n // 2}"}
        samples.append(
            {"id": n, "epoch": 1, "target": "x", "scores": scores, "metadata": metadata}
        )
    printed = [{"name": name, "scorer": name} for name in ("match", "judge")]
    log = {
        "version": 2,
        "status": "success",
        "eval": {"run_id": "x", "task": "toy"},
        "results": {"scores": printed},
        "samples": samples,
    }
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log))
    assert the_run(path).benchmark == "toy match"
    assert the_run(path, scorer="judge").scores == [0, 1, 0, 1]
    assert len(set(the_run(path, group="page").clusters)) == 2
    with pytest.raises(ContractError, match="no scorer exact; it has match, judge"):
        the_run(path, scorer="exact")


def test_what_a_form_does_not_have_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("item,score\n1,1\n2,0")
    with pytest.raises(
        ContractError, match="of table, for which --scorer means nothing; it takes"
    ):
        the_run(path, scorer="match")


def test_the_number_of_the_chosen_filter_is_the_printed_one(harness):
    results = {"acc,strict": 0.5, "acc_norm,strict": 0.75, "acc,flexible": 0.75}
    body = {"results": {"toy": results}}
    harness.with_name(f"results_{DATE}.json").write_text(json.dumps(body))
    for name, printed in (("strict", 0.5), ("flexible", 0.75)):
        run = the_run(harness, filter=name)
        assert run.printed == printed
        assert run.notes == [f"filter {name} of strict, flexible"]


def inspect_log(path, values):
    """A log of inspect_ai whose samples have these values of the field page."""
    samples = []
    for number, value in enumerate(values):
        scores = {"match": {"value": "C"}}
        samples.append({"id": number, "scores": scores, "metadata": {"page": value}})
    log = {
        "status": "success",
        "eval": {"run_id": "x", "task": "toy"},
        "results": {"scores": [{"name": "match", "scorer": "match"}]},
        "samples": samples,
    }
    path.write_text(json.dumps(log))
    return path


def test_group_of_inspect_ai_is_never_ignored(tmp_path):
    numbers = inspect_log(tmp_path / "numbers.json", [1.5, 1.5, 2.5, 2.5])
    assert len(set(the_run(numbers, group="page").clusters)) == 2
    mixed = the_run(
        inspect_log(tmp_path / "mixed.json", ["a", "a", None, ["b"]]), group="page"
    )
    assert mixed.clusters == ["a", "a", "2", "3"]
    (note,) = mixed.notes
    assert note.startswith("toy: 2 samples have no group")
    assert "sample 2: page is None" in note
    lists = inspect_log(tmp_path / "lists.json", [["a"], ["a"]])
    with pytest.raises(
        ContractError, match=r"sample 0: page is \['a'\].*another --group"
    ):
        the_run(lists, group="page")


def test_documents_of_the_harness_without_a_group_are_no_group(harness):
    harness.write_text(harness.read_text().replace('"video": "v0"', '"clip": null'))
    harness.write_text(harness.read_text().replace('"video": "v1"', '"clip": "v1"'))
    assert len(set(the_run(harness, group="clip").clusters)) == 5
