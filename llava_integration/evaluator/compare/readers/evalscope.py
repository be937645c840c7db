"""EvalScope: ``reviews/MODEL/DATASET_SUBSET.jsonl``, an answer and its scores a line, and the
printed numbers in ``reports/MODEL/DATASET.json``. A dataset's subsets have one number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
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
from llava_integration.evaluator.compare.readers.file_formats import (
    first_object,
    json_objects,
)
from llava_integration.evaluator.compare.readers.lettered_options import (
    lettered_options,
)
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value


@dataclass(frozen=True, kw_only=True)
class Review:
    """One judged answer."""

    id: str
    scores: dict[str, Any]  # the main one first
    texts: dict[str, str]  # question and answer
    truth: Any
    options: list[str]  # empty: there are none, or the log does not have them


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was printed of a dataset, and its name, the model's and the subsets'."""

    path: Path
    dataset: str
    model: str
    subsets: tuple[str, ...]
    numbers: dict[str, float]  # by the metric's name
    main: float | None = None  # that of the main metric, if the report says which it is

    @classmethod
    def of(cls, log: Path) -> "Report":
        """The report of a log; without one, nothing is printed and its name tells the task."""
        model = log.parent.name
        folder = log.parent.parent.parent / "reports" / model
        for path in sorted(folder.glob("*.json")):
            with errors_about(path):
                report = cls.read(path)
            if log.stem in [f"{report.dataset}_{subset}" for subset in report.subsets]:
                return report
        return cls(path=log, dataset=log.stem, model=model, subsets=(), numbers={})

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report in a file."""
        body = read_json_value(path)
        primary = body.get("primary_metric_identity")  # since 1.14, as identities are
        numbers: dict[str, float] = {}
        main = None
        for entry in body.get("metrics") or []:
            identity = entry.get("identity") or {}
            name = entry.get("name") or identity.get("name", "")
            score = entry["score"]
            if not isinstance(score, (int, float)):
                continue
            numbers.setdefault(name, score)
            if identity and identity == primary:
                main = score
        return cls(
            path=path,
            dataset=str(body.get("dataset_name")),
            model=str(body.get("model_name") or path.parent.name),
            subsets=subsets_of(body),
            numbers=numbers,
            main=main,
        )

    def main_metric(self, scores: dict[str, Any]) -> str:
        """The score of a sample that is compared: the first, or the first that has a number."""
        for name in (*scores, *self.numbers):
            if name in scores:
                return name
        return ""

    def printed(self, metric: str, *, is_main: bool) -> float | None:
        """The printed number of a metric, whose name may begin with how it is aggregated; the first
        number of a log that does not name its metric."""
        if is_main and self.main is not None:
            return self.main
        if not metric and self.numbers:
            return next(iter(self.numbers.values()))
        for name in (metric, f"mean_{metric}"):
            if name in self.numbers:
                return self.numbers[name]
        return None


def subsets_of(report: dict[str, Any]) -> tuple[str, ...]:
    """The names of a report's subsets."""
    names = []
    for metric in report.get("metrics") or []:
        for category in metric.get("categories") or []:
            for subset in category.get("subsets") or []:
                # since 1.14: of other subsets
                is_aggregate = subset.get("is_aggregate")
                if not is_aggregate and subset["name"] not in names:
                    names.append(subset["name"])
    return tuple(names)


def fits(path: Path) -> bool:
    """Recognized by the first line: a sample's score, or, up to 0.17, choices with reviews."""
    line = first_object(path)
    return "sample_score" in line or {"choices", "review_id", "raw_input"} <= set(line)


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """One subset, of the group of its dataset's subsets."""
    reviews = [review_of(line, where) for where, line in json_objects(path)]
    report = Report.of(path)
    metric = choices.metric or report.main_metric(reviews[0].scores)
    values: dict[str, list[float]] = {}
    reviews_of_id: dict[str, list[Review]] = {}
    for review in reviews:
        if metric not in review.scores:
            names = ", ".join(review.scores) or "none"
            raise ContractError(
                f"{path}, sample {review.id}: no score {metric}; it has {names}"
            )
        score = number(review.scores[metric], f"{path}, sample {review.id}: {metric}")
        values.setdefault(review.id, []).append(score)
        reviews_of_id.setdefault(review.id, []).append(review)
    items = []
    for name, repeats in values.items():
        review, *_ = reviews_of_id[name]
        answers = [review.texts.get("answer") for review in reviews_of_id[name]]
        item = {
            "id": name,
            "cluster": name,
            "score": sum(repeats) / len(repeats),
            "truth": review.truth,
            **review.texts,
            **all_answers(answers),
        }
        if review.options:
            item["choices"] = [short_text(option) for option in review.options]
        items.append(item)
    is_main = metric == next(iter(reviews[0].scores), "")
    printed = report.printed(metric, is_main=is_main)
    name = metric or next(iter(report.numbers), "score")
    task = report.dataset
    group: tuple[Any, ...] = ()
    if len(report.subsets) > 1:
        group = (report.dataset, name, printed, "", report.path)
        task = path.stem
    yield Log(
        benchmark=f"{task} {name}",
        metrics={},
        items=items,
        model=report.model,
        printed=printed,
        group=group,
    )


def review_of(line: dict[str, Any], where: str) -> Review:
    """A line of the log."""
    with errors_about(where):
        if "sample_score" in line:
            return scored_sample(line)
        return reviewed_choice(line)


def scored_sample(line: dict[str, Any]) -> Review:
    """A line since 1.0, which may be one of several answers to a question."""
    sample = line["sample_score"]
    score = sample["score"]
    values = dict(score.get("value") or {})
    main = score.get("main_score_name")
    if main in values:
        values = {main: values[main], **values}
    name = sample.get("group_id")
    if name is None:
        name = line["index"]
    question = line.get("input")
    for message in line.get("messages") or []:  # since 1.14
        if message.get("role") == "user":
            question = question or text_of(message.get("content"))
    answer = score.get("extracted_prediction") or score.get("prediction")
    return Review(
        id=str(name),
        scores=values,
        texts=shown_texts(question, answer),
        truth=line.get("target"),
        options=lettered_options(question, line.get("target")),
    )


def reviewed_choice(line: dict[str, Any]) -> Review:
    """A line up to 0.17, whose review has a number, or one for each of several metrics."""
    choice = line["choices"][0]
    review = choice["review"]
    result = review.get("result")
    raw = line.get("raw_input") or {}
    answer = review.get("pred")
    if not isinstance(answer, str):
        answer = (choice.get("message") or {}).get("content")
    return Review(
        id=str(line["index"]),
        scores=dict(result) if isinstance(result, dict) else {"": result},
        texts=shown_texts(raw.get("question") or raw.get("query"), answer),
        truth=review.get("gold"),
        options=options_of(raw),
    )


def options_of(raw: dict[str, Any]) -> list[str]:
    """The options of a data set's row: a list, or fields that are called A, B and so on."""
    listed = raw.get("choices")
    if isinstance(listed, list) and len(listed) > 1:
        return [str(option) for option in listed]
    options = []
    for letter in ascii_uppercase:
        if raw.get(letter) in (None, ""):
            break
        options.append(str(raw[letter]))
    return options if len(options) > 1 else []


def text_of(content: Any) -> str:
    """The text of a message, which may have pictures, too."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content or []:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "\n".join(texts)


READER = Reader(
    name="EvalScope",
    endings=(".jsonl",),
    fits=fits,
    read=read,
    choices=("metric",),
)
