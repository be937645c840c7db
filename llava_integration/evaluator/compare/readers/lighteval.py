"""lighteval with ``--save-details``: ``details/MODEL/DATE/details_TASK_DATE.parquet``, and the
printed numbers in ``results/MODEL/results_DATE.json``. Reading parquet needs pyarrow.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    BY_PART,
    Choices,
    Log,
    Reader,
    all_answers,
    negated,
    number,
    short_text,
    shown_texts,
)
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import sha256_text
from llm2clip_plugin.installation import MissingExtraError
from llm2clip_plugin.json_files import read_json_value

NAME = re.compile(r"details_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.parquet$")
AVERAGE = "_average"  # of the subsets of a task


def fits(path: Path) -> bool:
    """It is called as lighteval calls it."""
    return NAME.search(path.name) is not None


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(
            f"{path} is a parquet file, and pyarrow is not installed: pip install pyarrow"
        ) from None
    with errors_about(path, fix="was the run cut off?"):
        return parquet.read_table(path).to_pylist()


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """One task; the subsets of one (mmlu:anatomy) are a group if their average is printed."""
    name = NAME.search(path.name)
    assert name is not None
    results = Results(path, name["task"], name["date"])
    rows = rows_of(path)
    with errors_about(path):
        scores = [row.get("metric") or row["metrics"] for row in rows]
    metric = choices.metric or first_number(scores[0])
    if not metric:
        names = ", ".join(scores[0])
        problem = f"{path}: no metric has a number for each sample; metrics: {names}"
        yield Log(benchmark=results.task, metrics={}, items=[], unknown=problem)
        return
    sign = 1 if results.higher_is_better(metric) else -1
    items = []
    times: Counter[str] = Counter()
    for row_number, (row, of_row) in enumerate(zip(rows, scores, strict=True)):
        where = f"{path}, sample {row_number}"
        if metric not in of_row:
            raise ContractError(
                f"{where}: no metric {metric}; it has {', '.join(of_row)}"
            )
        with errors_about(where):
            item = item_since_0_9(row) if "doc" in row else item_up_to_0_8(row)
        question = item["id"]
        times[question] += 1
        if times[question] > 1:  # the same question again, which goes with the first
            item["id"] += f"#{times[question]}"
        score = sign * number(of_row[metric], f"{where}: {metric}")
        items.append({**item, "cluster": question, "score": score})
    log = Log(
        benchmark=f"{results.task} {metric}",
        metrics={},
        items=items,
        model=results.model,
        printed=results.printed(metric),
        group=results.group(metric),
    )
    yield log if sign == 1 else negated(log, metric)


def first_number(metrics: dict[str, Any]) -> str:
    """The first metric that is a number; others are made of the whole corpus."""
    for name, value in metrics.items():
        if isinstance(value, (bool, int, float)):
            return name
    return ""


def item_since_0_9(row: dict[str, Any]) -> dict[str, Any]:
    """Id, question, answer and truth of a row with a document and the model's response."""
    doc = row["doc"]
    response = row["model_response"]
    choices = doc.get("choices") or []
    texts = response.get("text_post_processed") or response.get("text") or []
    answer = texts[0] if texts else most_likely(choices, response.get("logprobs"))
    return {
        "id": str(doc["id"]),
        **shown_texts(doc.get("query"), answer),
        **all_answers(texts),
        "truth": chosen(choices, doc.get("gold_index")),
        **options_in(choices, doc.get("gold_index")),
    }


def item_up_to_0_8(row: dict[str, Any]) -> dict[str, Any]:
    """The same of a row without an id: the question stands for it."""
    choices = row.get("choices") or []
    predictions: list[Any] = row.get("predictions") or [None]
    answers = predictions
    # a likelihood, and whether it is the greedy answer
    if isinstance(predictions[0], (list, tuple)):
        likelihoods = [prediction[0] for prediction in predictions]
        answers = [most_likely(choices, likelihoods)]
    question = str(row.get("example"))
    return {
        "id": sha256_text(question)[:12],
        **shown_texts(question, answers[0]),
        **all_answers(answers),
        "truth": row.get("gold") or chosen(choices, row.get("gold_index")),
        **options_in(choices, row.get("gold_index")),
    }


def most_likely(
    options: Sequence[str], likelihoods: Sequence[float] | None
) -> str | None:
    """The option with the greatest likelihood; None if they are not of the options."""
    if not likelihoods or len(options) != len(likelihoods):
        return None
    best = max(range(len(options)), key=lambda place: likelihoods[place])
    return options[best].strip()


def options_in(choices: Sequence[str], index: Any) -> dict[str, list[str]]:
    """The field ``choices`` of an item whose choices are options; of others, all are right."""
    if len(choices) <= len(chosen(choices, index)):
        return {}
    return {"choices": [short_text(choice) for choice in choices]}


def chosen(choices: Sequence[str], index: Any) -> list[str]:
    """The right choices, of which there is one number or a list of them."""
    if index is None:
        return []
    numbers: list[int] = index if isinstance(index, list) else [index]
    return [choices[number] for number in numbers]


class Results:
    """A task in the file of results; without that file, nothing is known."""

    def __init__(self, details: Path, name: str, date: str):
        """``name``: the task in the name of its file."""
        self.name = name
        parts = name.split("|")
        # up to 0.12 it begins with the suite: "leaderboard|arc:challenge|25"
        self.task = "|".join(parts[-2:])
        self.path = results_file(details, date)
        body = read_json_value(self.path) if self.path.is_file() else {}
        with errors_about(self.path):
            config = body.get("config_general") or {}
            self.model = str(config.get("model_name") or "")
            self.numbers: dict[str, dict[str, float]] = body.get("results") or {}
            configs = body.get("config_tasks") or {}
            task = configs.get(name) or configs.get("|".join(parts[:-1])) or {}
            self.metrics = task.get("metrics") or task.get("metric") or []

    def printed(self, metric: str, of: str = "") -> float | None:
        """The printed number of the task, or of a group."""
        number = (self.numbers.get(of or self.name) or {}).get(metric)
        return float(number) if isinstance(number, (int, float)) else None

    def higher_is_better(self, metric: str) -> bool:
        """Whether more of a metric is better; so if the results don't say."""
        for entry in self.metrics:
            better = entry.get("higher_is_better")
            if isinstance(better, dict) and metric in better:
                return bool(better[metric])
            if entry.get("metric_name") == metric:
                return bool(better)
        return True

    def group(self, metric: str) -> tuple[Any, ...]:
        """What tells the task whose average over subsets is printed; () if there is none."""
        *suite, task, shots = self.name.split("|")
        name, colon, _ = task.partition(":")
        average = "|".join([*suite, f"{name}:{AVERAGE}", shots])
        printed = self.printed(metric, average)
        if not colon or printed is None:
            return ()
        return (f"{name}|{shots}", metric, printed, BY_PART, self.path)


def results_file(details: Path, date: str) -> Path:
    """The file of results of a task's details: in a folder of its own next to theirs, else next to
    them."""
    name = f"results_{date}.json"
    for folder in details.parents:
        if folder.name == "details":
            model = details.parent.parent.relative_to(folder)
            return folder.parent / "results" / model / name
    return details.with_name(name)


READER = Reader(
    name="lighteval",
    endings=(".parquet",),
    fits=fits,
    read=read,
    choices=("metric",),
)
