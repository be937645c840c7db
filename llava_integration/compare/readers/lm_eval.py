"""lm-evaluation-harness, ``--log_samples``: ``samples_TASK_DATE.jsonl`` beside ``results_DATE.json``."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_integration.compare.readers import CATEGORIES, IMAGES, Reader, first_object, first_of, json_lines, number
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError, read_json_value

NAME = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl$")


def fits(path: Path) -> bool:
    """A line has the hash of its document, and says which of its fields are metrics."""
    return {"doc_id", "doc_hash", "metrics"} <= set(first_object(path))


def read(path: Path) -> Iterator[ScoreFile]:
    """The task's first metric with a number for each document, under its first filter."""
    name = NAME.search(path.name)
    task = name["task"] if name else path.stem.removeprefix("samples_")
    results = path.with_name(f"results_{name['date']}.json") if name else path
    summary = read_json_value(results) if name and results.is_file() else {}
    better = summary.get("higher_is_better", {}).get(task, {})
    metric, items, filters = "", [], []
    for where, line in json_lines(path):
        if not {"doc_id", "metrics"} <= set(line):
            raise ContractError(f"{where}: no doc_id or metrics, as lm-evaluation-harness writes them")
        if not metric:
            metric = next((one for one in line["metrics"] if isinstance(line.get(one), (int, float))), "")
            if not metric:
                listed = ", ".join(line["metrics"])
                raise ContractError(f"{where}: none of the metrics {listed} has a number for each document")
        filters += [line.get("filter", "none")] if line.get("filter", "none") not in filters else []
        if line.get("filter", "none") == filters[0]:
            items.append(_item(line, number(line.get(metric), f"{where}: {metric}"), better.get(metric, True)))
    notes = [f"filter {filters[0]} of {', '.join(filters)}"] if len(filters) > 1 else []
    if not better.get(metric, True):
        notes.append(f"{metric}: lower is better, so its negative is compared")
    yield ScoreFile(
        benchmark=f"{task} {metric}", metrics={}, items=items, model=str(summary.get("model_name", "")), notes=notes
    )


def _item(line: dict[str, Any], score: float, higher_is_better: bool) -> dict[str, Any]:
    document = line["doc"] if isinstance(line.get("doc"), dict) else {}
    return {
        "id": line["doc_id"],
        "score": score if higher_is_better else -score,
        "cluster": first_of(document, IMAGES) or line["doc_id"],
        "category": first_of(document, CATEGORIES),
        "truth": line.get("target"),
        "hash": line.get("doc_hash"),
    }


READER = Reader(name="lm-evaluation-harness", endings=(".jsonl",), fits=fits, read=read)
