"""What the logs of lm-evaluation-harness and of lmms-eval, its fork, have in common: a line for
each document, in which a metric's value is a number or an object, and the file of results next to
it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    IMAGES,
    Log,
    first_of,
    short_text,
)
from llava_integration.evaluator.compare.readers.file_formats import json_objects
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

TEXTS = (
    "arguments",
    "resps",
    "filtered_resps",
    "metrics",
    "doc_hash",
    "prompt_hash",
    "target_hash",
)
CATEGORIES = ("category", "group", "subset", "subdomain", "question_type", "task")
# fields of a line that are no metrics
NO_METRICS = {"doc_id", "token_counts", "doc", "target", "filter", "arguments", *TEXTS}
ALONE = "the log names no images: questions are drawn one by one, so the interval may be too narrow"
# what is kept of a line beside its metrics
GROUP = "value of --group"
SHOWN = "what the page shows"
Lines = Sequence[tuple[str, dict[str, Any]]]  # where it is, and a line of the log


class Summary:
    """A task in the file of results; without that file, nothing is known."""

    def __init__(
        self, path: Path, pattern: re.Pattern[str], results: str, groups: str = ""
    ):
        """``path``: the task's log; ``groups``: the aggregate of a group's number."""
        name = pattern.search(path.name)
        self.task = name["task"] if name else path.stem.removeprefix("samples_")
        # the harness up to 0.4.2: MODEL_ARGUMENTS_TASK.jsonl next to results.json
        old = path.with_name("results.json")
        is_old = name is None and old.is_file()
        self.path = path.with_name(results.format(name["date"])) if name else path
        if is_old:
            self.path = old
        self.groups = groups
        self.filter = ""  # whose numbers are printed; "": the first
        body = {}
        if (name or is_old) and self.path.is_file():
            body = read_json_value(self.path)
        if is_old:
            tasks = []
            for task in body.get("results") or {}:
                if path.stem.endswith(f"_{task}"):
                    tasks.append(task)
            self.task = max(tasks, key=len, default=self.task)
        with errors_about(self.path):
            self.model = str(body.get("model_name", ""))
            # whether more is, by metric
            self.better = (body.get("higher_is_better") or {}).get(self.task) or {}
            self.numbers = body.get("results") or {}
            self.children = body.get("group_subtasks") or {}
            counts = (body.get("n-samples") or {}).get(self.task) or {}
            self.documents = counts.get("original") or 0  # of the task; 0: unknown

    def printed(self, metric: str, of: str = "") -> float | None:
        """The number that was printed of the task, or of a group."""
        numbers = self.numbers.get(of or self.task) or {}
        for key, value in numbers.items():
            name, _, filter_name = key.partition(",")
            is_chosen = self.filter in ("", filter_name) or not filter_name
            if name == metric and is_chosen and isinstance(value, (int, float)):
                return float(value)
        return None

    def size_notes(self, lines: Lines) -> list[str]:
        """A note if the log has a part of the task's documents."""
        logged = len({str(line["doc_id"]) for _, line in lines})
        if logged >= self.documents:
            return []
        return [
            f"{self.task}: the log has {logged:,} of the task's {self.documents:,} documents; "
            "the number is of these alone"
        ]

    def group(self, metric: str) -> tuple[Any, ...]:
        """What tells the largest group with one number for all its tasks; () if the task is in
        none."""
        largest = ""
        most_tasks = 0
        for name in self.children:
            tasks = self._leaves(name)
            if self.task not in tasks or self.printed(metric, name) is None:
                continue
            if len(tasks) > most_tasks:
                largest = name
                most_tasks = len(tasks)
        if not largest:
            return ()
        number = self.printed(metric, largest)
        return (largest, metric, number, self.groups, self.path)

    def _leaves(self, name: str) -> list[str]:
        """The tasks of a group, and of the groups in it."""
        leaves = []
        for child in self.children.get(name, ()):
            if child != name:
                leaves += self._leaves(child) or [child]
        return leaves

    def log(
        self,
        metric: str,
        items: list[dict[str, Any]],
        benchmark: str = "",
        **about: Any,
    ) -> Log:
        """The log of a metric."""
        about.setdefault("printed", self.printed(metric))
        if not benchmark:
            about.setdefault("group", self.group(metric))
        return Log(
            benchmark=benchmark or f"{self.task} {metric}",
            metrics={},
            items=items,
            model=self.model,
            **about,
        )


def lines_of(path: Path, group: str = "") -> Lines:
    """The lines without what is long and not compared: a million of them lie in memory. ``group``:
    the field of a line or its document whose value is kept as GROUP."""
    lines = []
    for where, line in json_objects(path):
        if "doc_id" not in line:
            raise ContractError(f"{where}: no doc_id")
        doc = line.get("doc")
        if group:
            line[GROUP] = group_of(line, group, where)
        line[SHOWN] = shown_texts(line)
        for name in TEXTS:
            line.pop(name, None)
        if isinstance(doc, dict):
            kept = (*IMAGES, *CATEGORIES)
            line["doc"] = {name: doc[name] for name in kept if name in doc}
        lines.append((where, line))
    return lines


def group_of(line: dict[str, Any], field: str, where: str) -> str:
    """The value of a field of a line or its document; "" for none, which is no group."""
    doc = line.get("doc")
    values = {**line, **doc} if isinstance(doc, dict) else line
    if field not in values:
        raise ContractError(
            f"{where}: no field {field} for --group; fields: {', '.join(values)}"
        )
    value = values[field]
    return "" if value is None else str(value)


def shown_texts(line: dict[str, Any]) -> dict[str, str]:
    """The question and the answer of a line, those that it has."""
    doc = line.get("doc")
    question = ""
    if isinstance(doc, dict):
        question = first_of(doc, ("question", "query", "problem"))
    question = question or line.get("input")
    texts = {"question": short_text(question), "answer": short_text(answer_of(line))}
    return {name: text for name, text in texts.items() if text}


def answer_of(line: dict[str, Any]) -> Any:
    """What the model said: a text, or the option that it found most likely."""
    answers = line.get("filtered_resps")
    if isinstance(answers, list) and len(answers) == 1 and isinstance(answers[0], str):
        return answers[0]
    options = line.get("arguments")
    if not isinstance(answers, list) or not isinstance(options, dict):
        return answers
    if len(options) != len(answers):
        return None
    likely = []
    for answer, option in zip(answers, options.values(), strict=True):
        if not isinstance(answer, list) or not isinstance(option, dict):
            return None
        likely.append((float(answer[0]), option.get("arg_1")))
    _, most_likely = max(likely, key=lambda pair: pair[0])
    return most_likely.strip() if isinstance(most_likely, str) else None


def item_of(line: dict[str, Any], value: Any, score: float) -> dict[str, Any]:
    """The item of a line, whose metric has this value."""
    about: dict[str, Any] = {}
    if isinstance(line.get("doc"), dict):
        about.update(line["doc"])
    about.update(value if isinstance(value, dict) and value else line)
    media = line.get("input_media")
    image = media[0] if media else ""
    image = image or first_of(about, IMAGES)
    return {
        "id": line["doc_id"],
        "score": score,
        "cluster": line.get(GROUP) or str(image or line["doc_id"]),
        "category": first_of(about, CATEGORIES),
        "truth": line.get("target"),
        **line.get(SHOWN, {}),
    }


def fields(value: Any, names: str, where: str) -> dict[str, Any]:
    """The object that a metric's value is; ContractError if it lacks one of these fields."""
    if not isinstance(value, dict) or not set(names.split()) <= set(value):
        raise ContractError(
            f"{where}: the metric is {str(value)[:80]}; expected an object with {names}"
        )
    return value
