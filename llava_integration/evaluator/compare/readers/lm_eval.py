"""lm-evaluation-harness with ``--log_samples``: ``samples_TASK_DATE.jsonl`` next to
``results_DATE.json``, or, up to 0.4.2, ``MODEL_ARGUMENTS_TASK.jsonl`` next to ``results.json``.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from llava_integration.evaluator.compare.readers import Choices, Log, Reader
from llava_integration.evaluator.compare.readers.file_formats import first_object
from llava_integration.evaluator.compare.readers.harness_lines import (
    NO_METRICS,
    Summary,
    lines_of,
)
from llava_integration.evaluator.compare.readers.harness_scores import scored
from llm2clip_plugin.errors import ContractError

HARNESS = re.compile(
    r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]*\d)\.jsonl(\.gz)?$"
)
# of a line of the harness up to 0.4.2, which wrote an array, without hashes and names of metrics
OLD_HARNESS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps"}


def fits(path: Path) -> bool:
    """Recognized by its name, or by a line with a document's hash and names of metrics."""
    if HARNESS.search(path.name):
        return True
    line = set(first_object(path))
    if "doc_hash" in line:
        return {"doc_id", "metrics"} <= line
    return line >= OLD_HARNESS


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """The task's first metric with a number for each document, under its first filter."""
    summary = Summary(path, HARNESS, "results_{}.json")
    lines = lines_of(path, choices.group)
    filters = list(dict.fromkeys(str(line.get("filter", "none")) for _, line in lines))
    name = choices.filter or filters[0]
    if name not in filters:
        raise ContractError(f"{path} has no filter {name}; it has {', '.join(filters)}")
    chosen = []
    for where, line in lines:
        if str(line.get("filter", "none")) == name:
            chosen.append((where, line))
    summary.filter = name
    first_line = first_object(path)
    metrics = first_line.get("metrics")
    if not metrics:
        metrics = [key for key in first_line if key not in NO_METRICS]
    if choices.metric:
        metrics = [choices.metric]
    log = scored(chosen, summary, metrics)
    if len(filters) > 1:
        log.notes.append(f"filter {name} of {', '.join(filters)}")
    log.notes.extend(summary.size_notes(lines))
    yield log


READER = Reader(
    name="lm-evaluation-harness",
    endings=(".jsonl", ".jsonl.gz"),
    fits=fits,
    read=read,
    choices=("group", "metric", "filter"),
)
