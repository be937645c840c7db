"""OpenCompass: ``results/MODEL/DATASET.json`` of a run with ``--dump-eval-details``, in which
``details`` has a score for each question.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    Choices,
    Log,
    Reader,
    all_answers,
    number,
    short_text,
    shown_texts,
)
from llava_integration.evaluator.compare.readers.lettered_options import (
    lettered_options,
)
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import read_json_value

RESULTS = "results"
PREDICTIONS = "predictions"
# fields of a question's details; evaluators name them differently
SCORES = ("correct", "cascade_correct", "is_correct", "score")
ANSWERS = ("predictions", "pred", "parsed", "prediction", "origin_prediction")
TRUTHS = ("references", "answer", "answers", "refr", "ref", "gold")
QUESTIONS = ("question", "prompt", "origin_prompt")


def fits(path: Path) -> bool:
    """It lies where OpenCompass writes, results with details or answers of which there are none."""
    kind = path.parent.parent.name
    if kind not in (RESULTS, PREDICTIONS):
        return False
    if kind == RESULTS:
        if body := body_of(path):
            return "details" in body
        is_ours = answers_of(path).is_file() or has_details(path)
        return is_ours and bool(damage_of(path))
    if "0" not in body_of(path):
        return False
    results = results_of(path)
    # of damaged results their own log says it
    return not damage_of(results) and "details" not in body_of(results)


def has_details(path: Path) -> bool:
    """Whether the text of a file, be it valid JSON or not, has details."""
    return b'"details"' in path.read_bytes()


def damage_of(path: Path) -> str:
    """Where a file stops being valid JSON; "" if it is valid, or there is none."""
    try:
        read_json_value(path)
    except OSError:
        return ""
    except ContractError as error:
        return f"{error}: the file is damaged; was the run cut off?"
    return ""


def results_of(predictions: Path) -> Path:
    """The results of a file of answers."""
    model = predictions.parent
    return model.parent.parent / RESULTS / model.name / predictions.name


def body_of(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    with suppress(ContractError, OSError):
        body = read_json_value(path)
        return body if isinstance(body, dict) else {}
    return {}


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """One dataset."""
    task = path.stem
    if path.parent.parent.name == PREDICTIONS:
        lacking = "the results have no score for each question"
        if not results_of(path).is_file():
            lacking = f"there are no results ({results_of(path)})"
        problem = (
            f"{path}: {lacking}; "
            "run OpenCompass again with --dump-eval-details (-m eval keeps the answers)"
        )
        yield Log(benchmark=task, metrics={}, items=[], unknown=problem)
        return
    body = body_of(path)
    if not body:
        raise ContractError(damage_of(path) or f"{path} has no results")
    metric, printed = printed_number(body)
    predictions = body_of(answers_of(path))
    notes = []
    damage = "" if predictions else damage_of(answers_of(path))
    if damage:
        notes.append(f"questions may lack their texts: {damage}")
    items = []
    for name, details in details_of(body["details"], task):
        score = score_of(details, choices.metric)
        if score is None:
            problem = f"{path}, question {name}: no score"
            raise ContractError(
                f"{problem}; its details are {', '.join(details)}; choose with --metric"
            )
        question = question_of({**predictions.get(name, {}), **details})
        answers = repeats_of(details)
        truth = first_value(details, TRUTHS)
        item = {
            "id": name,
            "cluster": name,
            "score": number(score, f"{path}, question {name}: score"),
            "truth": truth,
            **shown_texts(question, answers[0]),
            **all_answers(answers),
        }
        options = options_of(details) or lettered_options(question, truth)
        if options:
            item["choices"] = [short_text(option) for option in options]
        items.append(item)
    yield Log(
        benchmark=f"{task} {choices.metric or metric}",
        metrics={},
        items=items,
        model=path.parent.name,
        printed=None if choices.metric else printed,
        notes=notes,
    )


def answers_of(results: Path) -> Path:
    """The answers of a file of results."""
    model = results.parent
    return model.parent.parent / PREDICTIONS / model.name / results.name


def printed_number(body: dict[str, Any]) -> tuple[str, float | None]:
    """The first number of the results, in percent, with its name."""
    for name, value in body.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return name, float(value)
    return "score", None


def details_of(details: Any, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, details) of each question. Since 0.5 a value may be a list: a question's repeats."""
    entries = details.items() if isinstance(details, dict) else enumerate(details)
    for name, entry in entries:
        if isinstance(entry, dict):  # not the kind of the questions, "GEN" or "PPL"
            name = entry.get("example_abbr") or name
            yield str(name).removeprefix(f"{task}_"), entry


def score_of(details: dict[str, Any], chosen: str) -> Any:
    """The score of a question, mean over repeats. Without one the answer is compared with the
    truth, as the evaluator for accuracy does."""
    for name in (chosen,) if chosen else SCORES:
        value = details.get(name)
        repeats: list[Any] = value if isinstance(value, list) else [value]
        if repeats and all(isinstance(score, (bool, int, float)) for score in repeats):
            return sum(repeats) / len(repeats)
    if not chosen and {"predictions", "references"} <= set(details):
        return str(details["predictions"]) == str(details["references"])
    return None


def options_of(details: dict[str, Any]) -> list[str]:
    """The options whose likelihoods were asked for; empty if these are no options."""
    prediction = details.get("origin_prediction")
    if not isinstance(prediction, dict):
        return []
    options = []
    for name, value in prediction.items():
        if isinstance(value, dict) and "PPL" in value:
            options.append(name)
    return options


def question_of(details: dict[str, Any]) -> Any:
    """The question: a text, or the last message of a conversation; anything else if there is
    none."""
    prompt = first_value(details, QUESTIONS)
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("prompt")
    return prompt


def repeats_of(details: dict[str, Any]) -> list[str | None]:
    """The answers to a question, of which there may be several; [None] if there is none."""
    for name in ANSWERS:
        value = details.get(name)
        repeats = value if isinstance(value, list) else [value]
        if repeats and all(isinstance(answer, str) for answer in repeats):
            return repeats
    return [None]


def first_value(details: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of these fields that has a value; of a list of repeats the first."""
    for name in names:
        value = details.get(name)
        if (
            isinstance(value, list)
            and len(value) > 0
            and not isinstance(value[0], dict)
        ):
            value = value[0]
        if value is not None:
            return value
    return None


READER = Reader(
    name="OpenCompass",
    endings=(".json",),
    fits=fits,
    read=read,
    choices=("metric",),
)
