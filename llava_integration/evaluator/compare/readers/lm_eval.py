"""lm-evaluation-harness with ``--log_samples``: ``samples_TASK_DATE.jsonl`` next to
``results_DATE.json``, or, up to 0.4.2, ``MODEL_ARGUMENTS_TASK.jsonl``, which is an array, next to
``results.json`` or the file that was asked for.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llava_integration.evaluator.compare.readers import Choices, Log, Reader
from llava_integration.evaluator.compare.readers.file_formats import (
    first_object,
    json_objects,
)
from llava_integration.evaluator.compare.readers.harness_lines import (
    HARNESS_NAME,
    LMMS_NAME,
    NO_DOCUMENTS,
    NO_METRICS,
    Lines,
    is_harness_line,
    lines_of,
)
from llava_integration.evaluator.compare.readers.harness_results import (
    Summary,
)
from llava_integration.evaluator.compare.readers.harness_scores import scored
from llm2clip_plugin.errors import ContractError


def fits(path: Path) -> bool:
    """Recognized by its name, or by a line that only the harness writes."""
    if LMMS_NAME.search(path.name):
        return False
    return bool(HARNESS_NAME.search(path.name)) or is_harness_line(first_object(path))


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """The task's first metric with a number for each document, under its first filter."""
    summary = Summary(path, HARNESS_NAME, "results_{}.json")
    lines = lines_of(json_objects(path), choices.group)
    if not lines:
        raise ContractError(f"{path} {NO_DOCUMENTS}")
    lines = with_filters(lines, summary)
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
    yield replace(log, documents=summary.documents_in(lines))


def with_filters(lines: Lines, summary: Summary) -> Lines:
    """The lines, those of a log up to 0.4.2 with the name of their filter, which it lacks: it has
    all documents under the first filter, then all under the next."""
    if any("filter" in line for _, line in lines):
        return lines
    times: Counter[str] = Counter()
    numbers = []
    for _, line in lines:
        name = str(line["doc_id"])
        numbers.append(times[name])
        times[name] += 1
    if max(numbers) == 0:
        return lines
    names = summary.filters()
    for (_, line), number in zip(lines, numbers, strict=True):
        is_named = number < len(names)
        line["filter"] = names[number] if is_named else f"number {number + 1}"
    return lines


READER = Reader(
    name="lm-evaluation-harness",
    endings=(".jsonl", ".jsonl.gz", ".json"),
    fits=fits,
    read=read,
    choices=("group", "metric", "filter"),
)
