"""`compare --drift` claims nothing of what the logs do not hold: a prompt or an
answer that is the same."""

import json
import shutil

import pytest
from reader_logs import LOGS

from llava_integration.evaluator.compare.drift import (
    ANSWER,
    ANSWER_ALONE,
    ANSWER_OF_QUESTION,
    PROMPT,
    TRUTH,
    UNKNOWN,
    drift,
)
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.contracts import ScoreFile

QUESTION = {"question": "What is it?", "answer": "a cat"}
OTHER = {**QUESTION, "answer": "a dog"}
HASHED = {"prompt_hash": "p"}
LONG = {**QUESTION, "question": "x" * 600}
# the item of the old log, that of the new one, the cause of its other score
ITEMS = {
    "the prompt is the same": ({**QUESTION, **HASHED}, {**OTHER, **HASHED}, ANSWER),
    "the question alone is": (QUESTION, OTHER, ANSWER_OF_QUESTION),
    "one log has hashes": ({**QUESTION, **HASHED}, OTHER, ANSWER_OF_QUESTION),
    "one log has options": (
        {**QUESTION, "choices": ["a cat", "a dog"]},
        OTHER,
        ANSWER_OF_QUESTION,
    ),
    "the options differ": (
        {**QUESTION, "choices": ["a cat", "a dog"]},
        {**OTHER, "choices": ["a dog", "a cat"]},
        PROMPT,
    ),
    "questions are cut": (LONG, {**LONG, "answer": "a dog"}, ANSWER_ALONE),
    "a number is its text": ({**QUESTION, "truth": 1}, {**OTHER, "truth": "2"}, TRUTH),
    "truths of two types": (
        {**QUESTION, "truth": 1},
        {**OTHER, "truth": "1"},
        ANSWER_OF_QUESTION,
    ),
    "answers are null": (
        {**QUESTION, "answer": None},
        {**QUESTION, "answer": None},
        UNKNOWN,
    ),
    "the first of several answers": (
        {**QUESTION, "repeats": 4},
        {**QUESTION, "repeats": 4},
        UNKNOWN,
    ),
}


def cause_between(old, new):
    """The only cause of other scores between two sides."""
    ((result,), _) = drift(old, new)
    (change,) = result.changes
    return change.cause


@pytest.mark.parametrize("case", ITEMS)
def test_the_cause_is_no_more_than_what_the_logs_tell(tmp_path, case):
    *items, cause = ITEMS[case]
    sides = []
    for score, item in enumerate(items):
        record = ScoreFile(
            benchmark="toy",
            metrics={},
            items=[{"id": 1, "score": float(score), **item}],
            model="m",
            provenance={},
        )
        sides.append(load_side(record.write(tmp_path / f"{score}.scores.json")))
    assert cause_between(*sides) == cause


def helm(folder, prompt, *, trials=1, **state):
    """A run of which every question has another score than in the log, if the ``prompt`` is the
    other one."""
    shutil.copytree(LOGS / "helm" / "0.5.16" / "toy_run", folder)
    path = folder / "scenario_state.json"
    body = json.loads(path.read_text())
    for asked in body["request_states"]:
        asked["request"] = {"prompt": prompt}
        asked.update(state)
        if prompt == "other":
            asked["result"]["completions"][0]["text"] = "neither"
    body["request_states"] *= trials
    path.write_text(json.dumps(body))
    path = folder / "per_instance_stats.json"
    instances = json.loads(path.read_text())
    for instance in instances:
        for stat in instance["stats"]:
            if stat["name"]["name"] == "exact_match" and prompt != "plain":
                stat["mean"] = 1 - stat["mean"]
    path.write_text(json.dumps(instances))
    return load_side(folder)


def test_helms_prompt_is_more_than_the_question(tmp_path):
    old = helm(tmp_path / "old", "plain")
    assert cause_between(old, helm(tmp_path / "new", "other")) == PROMPT


def test_helms_likelihoods_of_options_are_no_answer(tmp_path):
    """Each option is echoed, whichever the model prefers."""
    sides = []
    for prompt in ("plain", "scored otherwise"):
        sides.append(helm(tmp_path / prompt, prompt, trials=2, reference_index=0))
    old, new = sides
    for side in sides:
        for (run,) in side.runs.values():
            assert all("answer" not in item for item in run.items)
    assert cause_between(old, new) == PROMPT


def opencompass(folder, is_right, answer):
    path = folder / "results" / "m" / "toy.json"
    path.parent.mkdir(parents=True)
    details = [{"correct": is_right, "pred": answer} for _ in range(5)]
    path.write_text(json.dumps({"accuracy": 100.0 * is_right, "details": details}))
    return load_side(folder)


def evalscope(folder, is_right, answer):
    path = folder / "reviews" / "m" / "toy.jsonl"
    path.parent.mkdir(parents=True)
    answers = answer if isinstance(answer, list) else [answer]
    lines = []
    for text in answers:
        score = {"value": {"acc": float(is_right)}, "prediction": text}
        lines.append(json.dumps({"index": 0, "sample_score": {"score": score}}))
    path.write_text("\n".join(lines))
    return load_side(folder)


@pytest.mark.parametrize("make", [opencompass, evalscope])
def test_an_answer_that_the_log_lacks_is_no_empty_one(tmp_path, make):
    sides = [make(tmp_path / str(right), right, {"x": 1}) for right in (False, True)]
    assert cause_between(*sides) == UNKNOWN


@pytest.mark.parametrize("make", [opencompass, evalscope])
def test_the_first_of_several_answers_is_not_all(tmp_path, make):
    """The score is the mean of all."""
    old = make(tmp_path / "old", False, ["it is 1", "it is 2"])
    new = make(tmp_path / "new", True, ["it is 1", "it is 3"])
    ((result,), _) = drift(old, new)
    assert [change.cause for change in result.changes] == [ANSWER_ALONE]
