"""Logs of other evaluators, one file a format; each defines ``READER``, and a new file is a new format.

A reader makes score files of logs, with an item for each question: ``id``, ``score`` (higher is better), ``cluster``
(what is resampled together: the questions of one image), ``category`` and ``truth`` where the log has them, and what a
composite's rule reads (``benchmarks/rules/``). Standard library only; what a format needs more is imported in its file.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llava_integration.benchmarks.rules.mme import COGNITION, PERCEPTION
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError, discover

IMAGES = ("image_id", "imageId", "img_id", "image_name", "image_path", "img_path", "image")  # a question's image
BY_PART = "mean of categories"  # an aggregate: categories have equal weight
NOTHING: Mapping[str, Any] = {}
OWN = "score files"  # name of the reader of ours, which take precedence
CATEGORIES = ("category", "group", "subset", "subdomain", "question_type", "task")


@dataclass(frozen=True, kw_only=True)
class Log(ScoreFile):
    """The scores of one task, scorer or run, and how its number is made of them."""

    aggregate: str = ""  # name in ``comparison.AGGREGATES``; "": the headline of the benchmark's rule, else the mean
    printed: float | None = None  # the number that the evaluator printed; a comparison says where its own differs
    # of the group whose tasks have one number: name, metric, printed number, aggregate, run
    group: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One form of logs."""

    name: str  # as in messages: "lmms-eval"
    endings: tuple[str, ...]  # of its files
    fits: Callable[[Path], bool]  # whether a file with such an ending is a log of this form; reads only its start
    read: Callable[[Path], Iterable[Log]]  # one for each task, scorer or run in the file; ContractError


def readers() -> dict[str, Reader]:
    """Every reader by name."""
    return discover(__name__, "READER")


def read_logs(path: Path) -> list[tuple[Path, Log]]:
    """The scores in a log, or in all logs below a folder, which must be of one form; none if there is no log.

    The tasks of a group (BLINK's 14, MMLU's 57) become one, with the tasks as categories.

    Raises ContractError for a log that cannot be read, or for logs of several forms in one folder.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: dict[Reader, list[Path]] = {}
    for reader in sorted(readers().values(), key=lambda one: one.name != OWN):
        logs = [file for file in files if file.name.endswith(reader.endings) and file.is_file() and reader.fits(file)]
        if logs:
            found[reader] = logs
            if reader.name == OWN:
                break
    if len(found) > 1:
        listed = "; ".join(f"{reader.name}: {logs[0]}" for reader, logs in found.items())
        raise ContractError(f"{path} has logs of {len(found)} forms ({listed}); name the folder or file of one")
    gc.disable()  # it would look at a million lines again and again, half of the time
    try:
        logs = [(file, log) for reader, files in found.items() for file in files for log in reader.read(file)]
    finally:
        gc.enable()
    groups: dict[Any, list[tuple[Path, Log]]] = {}
    for place, (file, log) in enumerate(logs):
        groups.setdefault(log.group or place, []).append((file, log))
    return [members[0] if len(members) == 1 else (members[0][0], _merged(members)) for members in groups.values()]


def _merged(members: list[tuple[Path, Log]]) -> Log:
    """The log of a group."""
    first, items = members[0][1], []
    name, metric, printed, aggregate, _ = first.group
    for _, log in members:
        task = log.benchmark.removesuffix(f" {metric}")
        items += [
            {**item, "id": f"{task}/{item['id']}", "cluster": f"{task}/{item['cluster']}", "category": task}
            for item in log.items
        ]
    notes = list(dict.fromkeys(note for _, log in members for note in log.notes))
    about = {"model": first.model, "printed": printed, "aggregate": aggregate, "notes": notes}
    return Log(benchmark=f"{name} {metric}", metrics={}, items=items, **about)


def mme_logs(items: list[dict[str, Any]], printed: Sequence[float | None], **about: Any) -> Iterator[Log]:
    """MME's two composites, of items with the image in ``cluster``; ``printed``: of perception and cognition."""
    parts = {"mme": PERCEPTION, "MME cognition": COGNITION}
    for (name, categories), number in zip(parts.items(), printed, strict=True):
        if chosen := [item for item in items if item["category"] in categories]:
            yield Log(benchmark=name, metrics={}, items=chosen, aggregate="MME", printed=number, **about)


def first_object(path: Path) -> dict[str, Any]:
    """The first line of a JSONL file, empty if it is not one."""
    try:
        return next((value for _, value in islice(json_lines(path), 1)), {})
    except ContractError:
        return {}


def number(value: Any, where: str) -> float:
    """A score as a number; ContractError for anything else. True is 1."""
    if isinstance(value, (int, float)) and abs(value) <= 1e12:
        return float(value)
    raise ContractError(f"{where} is {value!r}; expected a finite number")


def first_of(values: Mapping[str, Any], names: Iterable[str], others: Mapping[str, Any] = NOTHING) -> str:
    """The first of these fields that is a text or a number, as text; "" if there is none.

    ``others`` has what ``values`` lacks.
    """
    for name in names:
        if isinstance(value := values.get(name, others.get(name)), (str, int)):
            return str(value)
    return ""
