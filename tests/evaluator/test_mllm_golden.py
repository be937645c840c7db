"""Every number and every per-item value equals what the official scorers gave on the golden
predictions."""

import json

import pytest
from golden_mllm import BENCHMARKS, MODELS, ROOT, answers, expected

from llava_integration.evaluator.benchmarks.answers import read_answers
from llava_integration.evaluator.benchmarks.bench import score_answers
from llava_integration.evaluator.benchmarks.rules import benchmark

# sums of the same floats in another order, or statistics.mean's exact rational: a few units in
# the last place
TOLERANCE = 1e-9
# in expected.json: what is no number, and numbers of rules that are not the benchmark's own
NOT_OURS = {"stdout", "line", "split", "note", "missing_predictions", "samples_note"}
NOT_OURS |= {"raw_text", "lmms_eval_accuracy", "lmms_eval_static", "vanilla"}
NOT_ITS_RULE = {"vqav2": {"score_raw_percent"}, "vizwiz": {"score"}}  # by item


def score(name, model, **options):
    return score_answers(
        name, ROOT / name, read_answers(answers(name, model)), **options
    )


def numbers(tree, prefix=""):
    """All numbers of expected.json under the names that the metrics have; ``[value, count]`` pairs
    as two."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key in NOT_OURS:
            continue
        if isinstance(value, dict):
            yield from numbers(value, f"{name}.")
        elif isinstance(value, list) and name.startswith(
            "per_"
        ):  # GQA: [percent, count]
            yield name, value[0]
            yield f"{prefix[:-1]}_count.{key}", value[1]
        elif isinstance(value, list):  # SEED-Bench: [correct, count]
            yield f"{name}.correct", value[0]
            yield f"{name}.count", value[1]
        else:
            yield name, value


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_number(name, model):
    record = score(name, model)
    checked = dict(numbers(expected(name)["models"][model]))
    assert len(checked) >= 2
    for key, value in checked.items():
        assert record.metrics[key] == pytest.approx(value, abs=TOLERANCE), key
    if "missing_predictions" in expected(name)["models"][model]:
        assert (
            record.counts["missing"]
            == expected(name)["models"][model]["missing_predictions"]
        )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_headline_is_the_statistic_of_the_items(name):
    """What is resampled is what is printed."""
    for model in MODELS:
        record = score(name, model)
        chosen = benchmark(name)
        headline = record.metrics[chosen.headline] * chosen.scale
        assert chosen.statistic(record.items).full() == pytest.approx(
            headline, abs=TOLERANCE
        )


ITEM_KEYS = {  # how an expected item finds ours
    "mme": lambda item: (item["category"], item["file"], item["nth"]),
    "textvqa": lambda item: item["line"],
}
# an item's score x 100, rounded to 2 places
PERCENT = (
    "score_converted_percent",
    "score_vqa_api_percent",
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "mmbench"])
def test_every_item(name, model):
    record = score(name, model)
    key_of = ITEM_KEYS.get(name)
    ours = {(key_of or (lambda item: item["id"]))(item): item for item in record.items}
    theirs = expected(name)["per_item"][model]
    assert len(ours) == len(theirs) == len(record.items)
    for item in theirs:
        mine = ours[(key_of or (lambda item: item["question_id"]))(item)]
        for field in item.keys() - NOT_ITS_RULE.get(name, set()):
            value = item[field]
            if field == "question_id" and name != "textvqa":
                assert mine["id"] == value
                assert type(mine["id"]) is type(value)
            elif field in PERCENT:
                assert round(100 * mine["score"], 2) == pytest.approx(
                    value, abs=TOLERANCE
                ), item
            elif isinstance(value, float):
                assert mine[field] == pytest.approx(value, abs=TOLERANCE), (field, item)
            else:
                assert (
                    mine[{"text": "answer", "answer": "truth"}.get(field, field)]
                    == value
                ), (
                    field,
                    item,
                )


@pytest.mark.parametrize("model", MODELS)
def test_mmbench_groups_and_rows(model):
    record = score("mmbench", model)
    theirs = expected("mmbench")["per_item"][model]
    groups = {item["id"]: item for item in record.items}
    assert len(groups) == len(theirs["groups"])
    assert all(
        groups[group["g_index"]]["score"] == group["hit_vlmevalkit"]
        for group in theirs["groups"]
    )
    rows = {row["index"]: row for item in record.items for row in item["rows"]}
    assert len(rows) == len(theirs["rows"])
    for row in theirs["rows"]:
        assert {key: rows[row["index"]][key] for key in row} == row


@pytest.mark.parametrize("run", ["model-a_shuffled", "model-a_missing3"])
def test_pope_is_joined_never_zipped(run):
    """The official script's numbers of a shuffled or short file are wrong; ours are not."""
    quirk = expected("pope")["quirk_runs"][run]
    path = ROOT / "pope" / "quirk_answers" / f"{run}.jsonl"
    record = score_answers("pope", ROOT / "pope", read_answers(path))
    by_id = {item["id"]: item["score"] for item in score("pope", "model-a").items}
    assert all(
        by_id[item["id"]] == item["score"]
        for item in record.items
        if not item["missing"]
    )
    if run == "model-a_shuffled":
        for category, accuracy in quirk[
            "accuracy_if_joined_by_image_and_question"
        ].items():
            assert record.metrics[f"categories.{category}.accuracy"] == pytest.approx(
                accuracy, abs=TOLERANCE
            )
    else:
        assert record.counts["missing"] == 3
        assert (
            sum(
                record.metrics[f"categories.{c}.n"]
                for c in ("adversarial", "random", "popular")
            )
            == 301
        )


def test_popes_f1_is_of_answered_questions():
    """Also the one that is resampled: an unanswered "yes" is not one that was missed."""
    everything = score("pope", "model-a")
    chosen = benchmark("pope")
    unanswered = [item for item in everything.items if item["label"] == "yes"][:5]
    lost = {item["id"] for item in unanswered}
    questions = chosen.load(ROOT / "pope")
    given = {
        answer.id: answer for answer in read_answers(answers("pope", "model-a")).rows
    }
    items = [
        chosen.score_item(question, None if question.id in lost else given[question.id])
        for question in questions
    ]
    headline = chosen.metrics(items)[chosen.headline] * chosen.scale
    assert sum(bool(item["missing"]) for item in items) == 5
    assert chosen.statistic(items).full() == pytest.approx(headline, abs=TOLERANCE)
    answered = [item for item in items if not item["missing"]]
    assert chosen.statistic(answered).full() == pytest.approx(headline, abs=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "gqa", "seedbench", "mmbench"])
def test_submission_is_the_official_converters(name, model, tmp_path):
    """And it scores as the answers do, where it keeps what scoring needs."""
    output = tmp_path / "submission.json"
    read = read_answers(answers(name, model))
    benchmark(name).write_submission(ROOT / name, read, output)
    official = {
        "vqav2": f"answers_upload/llava_vqav2_mscoco_val2014/{model}.json",
        "vizwiz": f"answers_upload/{model}.json",
        "gqa": f"data/{model}_testdev_balanced_predictions.json",
        "seedbench": f"answers_upload/{model}.jsonl",
        "mmbench": f"answers_upload/mmbench_dev_20230712/{model}.jsonl",
    }[name]
    ours = output.read_text(encoding="utf-8")
    theirs = (ROOT / name / official).read_text(encoding="utf-8")
    if official.endswith(".jsonl"):
        assert [json.loads(line) for line in ours.splitlines()] == [
            json.loads(line) for line in theirs.splitlines()
        ]
    else:
        assert json.loads(ours) == json.loads(theirs)
    if name != "mmbench":
        record = score_answers(name, ROOT / name, read_answers(output))
        headline = benchmark(name).headline
        assert record.metrics[headline] == pytest.approx(
            score(name, model).metrics[headline], abs=TOLERANCE
        )
