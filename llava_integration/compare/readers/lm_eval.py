"""lm-evaluation-harness, ``--log_samples``: ``samples_TASK_DATE.jsonl`` next to ``results_DATE.json``."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llava_integration.compare.readers import CATEGORIES, IMAGES, Reader, first_object, first_of, number
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError, read_json_value

NAME = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl$")


def fits(path: Path) -> bool:
    """Its name says so, or a line has the hash of its document and says which of its fields are metrics."""
    return bool(NAME.search(path.name)) or {"doc_id", "doc_hash", "metrics"} <= set(first_object(path))


def read(path: Path) -> Iterator[ScoreFile]:
    """The task's first metric with a number for each document, under its first filter."""
    name = NAME.search(path.name)
    task = name["task"] if name else path.stem.removeprefix("samples_")
    model, better = summary_of(path.with_name(f"results_{name['date']}.json") if name else None, task)
    lines = list(json_lines(path))
    filters = list(dict.fromkeys(str(line.get("filter", "none")) for _, line in lines))
    record = scored(
        [(where, line) for where, line in lines if str(line.get("filter", "none")) == filters[0]],
        task=task,
        metrics=lines[0][1]["metrics"],
        better=better,
        model=model,
    )
    record.notes.extend([f"filter {filters[0]} of {', '.join(filters)}"] if len(filters) > 1 else [])
    yield record


# What lmms-eval, a fork, has as well


def summary_of(results: Path | None, task: str) -> tuple[str, dict[str, bool]]:
    """The model's name, and whether more is better of each metric, if the file of results is there."""
    summary = read_json_value(results) if results and results.is_file() else {}
    return str(summary.get("model_name", "")), summary.get("higher_is_better", {}).get(task, {})


def scored(
    lines: Sequence[tuple[str, dict[str, Any]]],
    *,
    task: str,
    metrics: Iterable[str],
    better: Mapping[str, bool],
    model: str,
) -> ScoreFile:
    """The score file of the first of ``metrics`` with a number, in each line if there is one; of (where, line)."""
    known = [one for one in metrics if _score(lines[0][1].get(one)) is not None]
    if not known:
        raise ContractError(f"{lines[0][0]}: none of the metrics {', '.join(metrics)} of {task} has a number")
    metric = min(known, key=lambda one: sum(one not in line for _, line in lines))  # others are of a part
    sign = 1 if better.get(metric, True) else -1
    items = []
    for where, line in lines:
        if "doc_id" not in line:
            raise ContractError(f"{where}: no doc_id")
        document, value = line.get("doc"), line.get(metric)
        about = {**(document if isinstance(document, dict) else {}), **(value if isinstance(value, dict) else line)}
        item = {"id": line["doc_id"], "score": sign * number(_score(value), f"{where}: {metric}")}
        item |= {"cluster": image_of(line), "category": first_of(about, CATEGORIES)}
        items.append({**item, "truth": line.get("target")})
    notes = [] if sign == 1 else [f"{metric}: lower is better, so its negative is compared"]
    return ScoreFile(benchmark=f"{task} {metric}", metrics={}, items=items, model=model, notes=notes)


def image_of(line: dict[str, Any]) -> str:
    """The image of a question: the first of its media, a field of its document, or the question itself."""
    media, document = line.get("input_media"), line.get("doc")
    if isinstance(media, list) and media:
        return str(media[0])
    return first_of(document if isinstance(document, dict) else {}, IMAGES) or str(line["doc_id"])


def _score(value: Any) -> float | bool | None:
    """A metric's number for one document: the value, its ``score``, or whether its ``pred`` is its ``answer``."""
    if isinstance(value, dict):
        both = {"pred", "answer"} <= set(value)
        value = str(value["pred"]).lower() == str(value["answer"]).lower() if both else value.get("score")
    return value if isinstance(value, (int, float)) else None


READER = Reader(name="lm-evaluation-harness", endings=(".jsonl",), fits=fits, read=read)
