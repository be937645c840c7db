"""lm-evaluation-harness, ``--log_samples``: ``samples_TASK_DATE.jsonl`` next to ``results_DATE.json``."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llava_integration.compare.readers import CATEGORIES, IMAGES, Log, Reader, first_object, first_of, number
from llm2clip_plugin.files import ContractError, read_json_value

NAME = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl$")
TEXTS = ("arguments", "resps", "filtered_resps", "metrics", "doc_hash", "prompt_hash", "target_hash")
ABOUT = (*IMAGES, *CATEGORIES)
Lines = Sequence[tuple[str, dict[str, Any]]]  # where it is, and a line of the log


def fits(path: Path) -> bool:
    """Recognized by its name, or by a line that has the hash of its document and the names of its metrics."""
    return bool(NAME.search(path.name)) or {"doc_id", "doc_hash", "metrics"} <= set(first_object(path))


def read(path: Path) -> Iterator[Log]:
    """The task's first metric with a number for each document, under its first filter."""
    name = NAME.search(path.name)
    task = name["task"] if name else path.stem.removeprefix("samples_")
    summary = Summary(path.with_name(f"results_{name['date']}.json") if name else None, task)
    lines = [(where, without_texts(line)) for where, line in json_lines(path)]
    of_line = [str(line.get("filter", "none")) for _, line in lines]
    filters = list(dict.fromkeys(of_line))
    chosen = [line for line, own in zip(lines, of_line, strict=True) if own == filters[0]]
    metrics = first_object(path).get("metrics")
    log = scored(chosen, summary, metrics=list(map(str, metrics)) if isinstance(metrics, list) else [])
    log.notes.extend([f"filter {filters[0]} of {', '.join(filters)}"] if len(filters) > 1 else [])
    yield log


def without_texts(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what is long and not compared: a million of them lie in memory."""
    for name in TEXTS:
        line.pop(name, None)
    if isinstance(doc := line.get("doc"), dict):
        line["doc"] = {name: doc[name] for name in ABOUT if name in doc}
    return line


# What lmms-eval, a fork, has as well


class Summary:
    """A task in the file of results; without that file, nothing is known."""

    def __init__(self, results: Path | None, task: str, groups: str = ""):
        """``groups``: the aggregate of a group's number."""
        body = _object(read_json_value(results) if results and results.is_file() else {})
        self.path, self.task, self.groups = results, task, groups
        self.model = str(body.get("model_name", ""))
        self.better = _object(_object(body.get("higher_is_better")).get(task))  # whether more is, by metric
        self.numbers, self.children = _object(body.get("results")), _object(body.get("group_subtasks"))

    def printed(self, metric: str, of: str = "") -> float | None:
        """The number that was printed of the task, or of a group."""
        numbers = _object(self.numbers.get(of or self.task))
        values = [value for name, value in numbers.items() if name.split(",")[0] == metric]
        return next((float(value) for value in values if isinstance(value, (int, float))), None)

    def group(self, metric: str) -> tuple[Any, ...]:
        """What tells the largest group with one number for all its tasks; () if the task is in none."""
        tasks = {name: self._leaves(name) for name in self.children}
        groups = [name for name in tasks if self.task in tasks[name] and self.printed(metric, name) is not None]
        largest = max(groups, key=lambda name: len(tasks[name]), default="")
        return (largest, metric, self.printed(metric, largest), self.groups, self.path) if largest else ()

    def _leaves(self, name: str) -> list[str]:
        children = self.children.get(name)
        below = [str(one) for one in children if one != name] if isinstance(children, list) else []
        return [leaf for one in below for leaf in self._leaves(one) or [one]]

    def log(self, metric: str, items: list[dict[str, Any]], benchmark: str = "", **about: Any) -> Log:
        """The log of a metric."""
        about = {"printed": self.printed(metric), "group": () if benchmark else self.group(metric), **about}
        return Log(benchmark=benchmark or f"{self.task} {metric}", metrics={}, items=items, model=self.model, **about)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def scored(lines: Lines, summary: Summary, *, metrics: Iterable[str]) -> Log:
    """The log of the first of ``metrics`` with a number, in each line if there is one."""
    known = [one for one in metrics if score_of(lines[0][1].get(one)) is not None]
    if not known:
        raise ContractError(f"{lines[0][0]}: none of the metrics {', '.join(metrics)} of {summary.task} has a number")
    metric = min(known, key=lambda one: sum(one not in line for _, line in lines))  # others are of a part
    sign = 1 if summary.better.get(metric, True) else -1
    items = [
        item_of(where, line, line.get(metric), sign * number(score_of(line.get(metric)), f"{where}: {metric}"))
        for where, line in lines
    ]
    if sign == 1:
        return summary.log(metric, items)
    printed = summary.printed(metric)
    notes = [f"{metric}: lower is better, so its negative is compared"]
    return summary.log(metric, items, printed=None if printed is None else -printed, group=(), notes=notes)


def item_of(where: str, line: dict[str, Any], value: Any, score: float) -> dict[str, Any]:
    """The item of a line, whose metric has this value."""
    if "doc_id" not in line:
        raise ContractError(f"{where}: no doc_id")
    media, about, doc = line.get("input_media"), _object(value) or line, _object(line.get("doc"))
    return {
        "id": line["doc_id"],
        "score": score,
        "cluster": (str(media[0]) if isinstance(media, list) and media else first_of(about, IMAGES, doc))
        or str(line["doc_id"]),
        "category": first_of(about, CATEGORIES, doc),
        "truth": line.get("target"),
    }


def score_of(value: Any) -> float | bool | None:
    """A metric's number for one document: the value, its ``score``, or whether it is right."""
    if isinstance(value, dict):
        if {"pred", "answer"} <= set(value):
            return str(value["pred"]).lower() == str(value["answer"]).lower()
        if {"parsed_pred", "answer"} <= set(value):  # MMMU's
            return any(_mmmu(one, value["answer"]) for one in value["parsed_pred"])
        value = value.get("score", value.get("is_correct"))
    return value if isinstance(value, (int, float)) else None


def _mmmu(answer: Any, truth: Any) -> bool:
    """A letter, or an open question's candidates, texts that contain the truth and numbers that are it."""
    if not isinstance(answer, list):
        return answer in truth if isinstance(truth, list) else answer == truth
    for text in (one.strip() for one in (truth if isinstance(truth, list) else [truth])):
        try:
            if round(float(text.replace(",", "")), 2) in answer:
                return True
        except ValueError:
            parts = [text.lower()] if len(text) > 1 else [f" {text.lower()}", f"{text.lower()} "]
            if any(part in one for part in parts for one in answer if isinstance(one, str)):
                return True
    return False


READER = Reader(name="lm-evaluation-harness", endings=(".jsonl",), fits=fits, read=read)
