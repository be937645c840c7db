"""The file of results next to a log of lm-evaluation-harness or lmms-eval: the printed numbers of a
task and of its groups, the model, and how many documents the task has."""

import re
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import Log
from llava_integration.evaluator.compare.readers.harness_lines import Lines
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.json_files import read_json_value


class Summary:
    """A task in the file of results; without that file, nothing is known."""

    def __init__(
        self, path: Path, pattern: re.Pattern[str], results: str, groups: str = ""
    ):
        """``path``: the task's log; ``groups``: the aggregate of a group's number."""
        self.groups = groups
        self.filter = ""  # whose numbers are printed; "": the first
        name = pattern.search(path.name)
        if name:
            self.task = name["task"]
            self.path = path.with_name(results.format(name["date"]))
            body = read_json_value(self.path) if self.path.is_file() else {}
        else:
            self.task = path.name.split(".json")[0].removeprefix("samples_")
            self.path, body = old_results(path)
            tasks = body.get("results") or {}
            named = [task for task in tasks if is_named_by(self.task, task)]
            self.task = max(named, key=len, default=self.task)
        with errors_about(self.path):
            self.model = model_named_in(body)
            # whether more is, by metric
            self.better = (body.get("higher_is_better") or {}).get(self.task) or {}
            self.numbers = body.get("results") or {}
            self.children = body.get("group_subtasks") or {}
            counts = (body.get("n-samples") or {}).get(self.task) or {}
            self.documents = counts.get("original") or 0  # of the task; 0: unknown
            # whose numbers are printed: fewer with --limit
            self.evaluated = counts.get("effective") or 0

    def printed(self, metric: str, of: str = "") -> float | None:
        """The number that was printed of the task, or of a group."""
        numbers = self.numbers.get(of or self.task) or {}
        for key, value in numbers.items():
            name, _, filter_name = key.partition(",")
            is_chosen = self.filter in ("", filter_name) or not filter_name
            if name == metric and is_chosen and isinstance(value, (int, float)):
                return float(value)
        return None

    def filters(self) -> list[str]:
        """The names of the filters under which numbers were printed."""
        names: list[str] = []
        for key in self.numbers.get(self.task) or {}:
            metric, _, name = key.partition(",")
            if name and not metric.endswith("_stderr") and name not in names:
                names.append(name)
        return names

    def size_notes(self, lines: Lines) -> list[str]:
        """A note if the log has a part of the task's documents."""
        logged = documents_of(lines)
        if logged >= self.documents:
            return []
        return [
            f"{self.task}: the log has {logged:,} of the task's {self.documents:,} documents; "
            "the number is of these alone"
        ]

    def documents_in(self, lines: Lines) -> tuple[int, int] | None:
        """How many documents the log has, and how many were evaluated; None if unknown."""
        if not self.evaluated:
            return None
        return documents_of(lines), self.evaluated

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

    def _leaves(self, name: str, above: tuple[str, ...] = ()) -> list[str]:
        """The tasks of a group, and of the groups in it; ``above``: the groups that it is in."""
        leaves = []
        for child in self.children.get(name, ()):
            if child != name and child not in above:
                leaves += self._leaves(child, (*above, name)) or [child]
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


def documents_of(lines: Lines) -> int:
    """How many documents a log has."""
    return len({str(line["doc_id"]) for _, line in lines})


def is_named_by(stem: str, task: str) -> bool:
    """Whether a log is of a task: it is called so, or, up to 0.4.2, MODEL_ARGUMENTS_TASK."""
    return stem == task or stem.endswith(f"_{task}")


def old_results(log: Path) -> tuple[Path, dict[str, Any]]:
    """The file of results next to a log whose name has no date, and its object; the log itself and
    {} if there is none. It is results.json, or has another name with --output_path FILE.json."""
    candidates = [log.with_name("results.json")]
    candidates += sorted(log.parent.glob("*.json*"))
    for path in candidates:
        if path == log or not path.is_file() or path.suffix not in (".json", ".jsonl"):
            continue
        with path.open("rb") as file:
            is_results = file.read(100).lstrip().startswith(b'{\n  "results"')
        if not is_results and path.name != "results.json":
            continue
        body = read_json_value(path)
        tasks = body.get("results") if isinstance(body, dict) else None
        stem = log.name.split(".json")[0]
        if tasks and any(is_named_by(stem, task) for task in tasks):
            return path, body
    return log, {}


# what names a model in --model_args
MODEL_ARGUMENT = re.compile(r"(?:^|,)(?:pretrained|model|path|model_version)=([^,]+)")


def model_named_in(results: dict[str, Any]) -> str:
    """The model of a file of results; "" if it has none. Up to 0.4.2 it is in the arguments."""
    if results.get("model_name"):
        return str(results["model_name"])
    config = results.get("config") or {}
    arguments = str(config.get("model_args") or "")
    named = MODEL_ARGUMENT.search(arguments)
    return named[1] if named else str(config.get("model") or "")
