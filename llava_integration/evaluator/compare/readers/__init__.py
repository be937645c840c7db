"""Logs of other evaluators, one file a format; each defines ``READER``, and a new file is a new
format.

A reader makes score files of logs, with an item for each question: ``id``, ``score`` (higher is
better), ``cluster`` (what is resampled together: the questions of one image), ``category`` and
``truth`` where the log has them, and what a composite's rule reads (``benchmarks/rules/``).
Standard library only; what a format needs more is imported in its file.
"""

import csv
import gc
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from llava_integration.evaluator.benchmarks.answers import json_lines
from llava_integration.evaluator.benchmarks.rules.mme import COGNITION, PERCEPTION
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.discovery import discover
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

# a question's image or video; a table may have the picture itself in the last one
IMAGES = (
    "image_id",
    "imageId",
    "img_id",
    "image_name",
    "image_path",
    "img_path",
    "videoID",
    "video_id",
    "video_name",
    "video",
    "image",
)
BY_PART = "mean of categories"  # an aggregate: categories have equal weight
# aggregates of items with the ``loglikelihood`` of a text and its ``length``
PERPLEXITY = "perplexity"
BITS = "bits per byte"
OWN = "score files"  # name of the reader of ours, which take precedence
LONGEST_TEXT = (
    600  # characters of a question or an answer: a million of them lie in memory
)
csv.field_size_limit(2**24)


@dataclass(frozen=True, kw_only=True)
class Log(ScoreFile):
    """The scores of one task, scorer or run, and how its number is made of them."""

    # MME | CIDEr | BY_PART | name of a rule | "": the headline of the benchmark's, else the mean
    aggregate: str = ""
    # the number that the evaluator printed; a comparison says where its own differs
    printed: float | None = None
    # of the group whose tasks have one number: name, metric, printed number, aggregate, run
    group: tuple[Any, ...] = ()
    # whether the log says which task it is of; else its file's name stands for it
    named: bool = True
    # that it was read from; those of a group's tasks
    files: tuple[Path, ...] = ()
    # why a log has no items: nobody knows how its number is made; other logs are compared
    unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is read of a log that has several of it; "": what the reader takes by itself."""

    group: str = ""  # field whose values tell which items go together
    metric: str = ""  # metric, or column of the score
    filter: str = ""  # of the harness: how answers are extracted
    scorer: str = ""  # of inspect_ai

    def names(self) -> list[str]:
        """Those that are made."""
        return [name for name, value in vars(self).items() if value]


NO_CHOICES = Choices()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One form of logs."""

    name: str  # as in messages: "lmms-eval"
    endings: tuple[str, ...]  # of its files
    # whether a file with such an ending is a log of this form; reads only its start
    fits: Callable[[Path], bool]
    # one for each task, scorer or run in the file; any error names the file. With Choices as its
    # second argument if there are ``choices``.
    read: Callable[..., Iterable[Log]]
    choices: tuple[str, ...] = ()  # the fields of Choices that it takes
    # whether a file that does not fit does with the chosen metric; None: no metric changes that
    fits_metric: Callable[[Path, str], bool] | None = None

    def takes(self, file: Path, choices: Choices) -> bool:
        """Whether a file is a log of this form."""
        if not file.name.endswith(self.endings) or not file.is_file():
            return False
        if self.fits(file):
            return True
        if self.fits_metric is None or not choices.metric:
            return False
        return self.fits_metric(file, choices.metric)


def readers() -> dict[str, Reader]:
    """Every reader by name."""
    return discover(__name__, "READER")


def read_logs(path: Path, choices: Choices = NO_CHOICES) -> list[tuple[Path, Log]]:
    """The scores in a log, or in all logs below a folder; none if there is no log. The tasks of a
    group (BLINK's 14, MMLU's 57) become one. Raises ContractError for a log that cannot be read, or
    logs of several forms. Of several files, one that cannot be read is a log with the reason."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: dict[Reader, list[Path]] = {}
    for reader in sorted(readers().values(), key=lambda one: one.name != OWN):
        logs = [file for file in files if reader.takes(file, choices)]
        if logs:
            found[reader] = logs
            if reader.name == OWN:
                break
    if len(found) > 1:
        listed = "; ".join(
            f"{reader.name}: {logs[0]}" for reader, logs in found.items()
        )
        raise ContractError(
            f"{path} has logs of {len(found)} forms ({listed}); name the folder or file of one"
        )
    groups: dict[Any, list[tuple[Path, Log]]] = {}
    gc.disable()  # it would look at a million lines again and again, half of the time
    try:
        for reader, logs in found.items():
            for file in logs:
                for number, log in enumerate(
                    logs_of(file, reader, choices, alone=len(files) == 1)
                ):
                    groups.setdefault(log.group or (file, number), []).append(
                        (file, log)
                    )
    finally:
        gc.enable()
    return [
        members[0] if len(members) == 1 else (members[0][0], _merged(members))
        for members in groups.values()
    ]


def logs_of(file: Path, reader: Reader, choices: Choices, *, alone: bool) -> list[Log]:
    """The logs in a file. If it is not ``alone`` and cannot be read, one that says why."""
    for name in choices.names():
        if name not in reader.choices:
            takes = (
                ", ".join(f"--{choice}" for choice in reader.choices)
                or "no such option"
            )
            raise ContractError(
                f"{file} is of {reader.name}, for which --{name} means nothing; it takes {takes}"
            )
    try:
        with errors_about(file):
            logs = list(
                reader.read(file, choices) if reader.choices else reader.read(file)
            )
    except ContractError as error:
        if alone:
            raise
        logs = [Log(benchmark=file.stem, metrics={}, items=[], unknown=str(error))]
    return [replace(log, files=(file,)) for log in logs]


def _merged(members: list[tuple[Path, Log]]) -> Log:
    """The log of a group."""
    first = members[0][1]
    items = []
    name, metric, printed, aggregate, _ = first.group
    for _, log in members:
        task = log.benchmark.removesuffix(f" {metric}")
        items += [
            {
                **item,
                "id": f"{task}/{item['id']}",
                "cluster": f"{task}/{item['cluster']}",
                "category": task,
            }
            for item in log.items
        ]
    notes = list(dict.fromkeys(note for _, log in members for note in log.notes))
    about = {
        "model": first.model,
        "printed": printed,
        "aggregate": aggregate,
        "notes": notes,
    }
    files = tuple(file for file, _ in members)
    return Log(
        benchmark=f"{name} {metric}", metrics={}, items=items, files=files, **about
    )


def mme_logs(
    items: list[dict[str, Any]], printed: Sequence[float | None], **about: Any
) -> Iterator[Log]:
    """MME's two composites, of items with the image in ``cluster``; ``printed``: of perception and
    cognition."""
    parts = {"mme": PERCEPTION, "MME cognition": COGNITION}
    for (name, categories), number in zip(parts.items(), printed, strict=True):
        if chosen := [item for item in items if item["category"] in categories]:
            yield Log(
                benchmark=name,
                metrics={},
                items=chosen,
                aggregate="MME",
                printed=number,
                **about,
            )


JSON_TABLES = (".json", ".jsonl")


def table(path: Path, *, errors: str = "strict") -> Iterator[tuple[str, list[Any]]]:
    """(where, cells) of a table's rows, the names of its columns first: CSV, TSV, JSONL, JSON or
    Excel."""
    if path.suffix == ".xlsx":
        from openpyxl import load_workbook

        rows = (
            load_workbook(path, read_only=True)
            .worksheets[0]
            .iter_rows(values_only=True)
        )
        yield from (
            (f"{path}, line {line}", list(row)) for line, row in enumerate(rows, 1)
        )
    elif path.suffix in JSON_TABLES:
        rows = list(json_rows(path))
        # a row need not have every column
        names = list(dict.fromkeys(name for _, row in rows for name in row))
        if rows:
            first_place, _ = rows[0]
            yield first_place, names
        for where, row in rows:
            yield where, [row.get(name) for name in names]
    else:
        with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            yield from (
                (f"{path}, line {lines.line_num}", line) for line in lines if line
            )


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL file, or of a JSON file with an array of rows."""
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    for number, row in enumerate(read_json_value(path), 1):
        yield f"{path}, row {number}", row


def columns(path: Path) -> list[str]:
    """The names of a table's columns, of a JSON table those of its first row; none if it can't be
    read."""
    try:
        with errors_about(path):
            if path.suffix in JSON_TABLES:
                _, row = next(json_rows(path), ("", {}))
                return [str(name) for name in row]
            _, names = next(table(path, errors="replace"), ("", []))
            return [str(name) for name in names]
    except ContractError:
        return []


HEAD = 1 << 20  # characters of a JSON array in which its first object ends


def first_object(path: Path) -> dict[str, Any]:
    """The first object of a JSONL file, or of a file with an array of objects; empty if it is
    neither."""
    with open_text(path) as file:
        head = file.read(HEAD)
    if head.lstrip().startswith("["):
        with suppress(ValueError):
            value, _ = json.JSONDecoder().raw_decode(head.lstrip()[1:].lstrip())
            return value if isinstance(value, dict) else {}
        return {}
    try:
        return next((value for _, value in islice(json_objects(path), 1)), {})
    except ContractError:
        return {}


def open_text(path: Path) -> IO[str]:
    """A text file, or one that gzip packed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8-sig", errors="replace")


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a JSONL file, also of a packed one, or of an array of objects. Raises
    ContractError that names the line or the sample."""
    with open_text(path) as file:
        is_array = file.read(HEAD).lstrip().startswith("[")
    if not is_array and path.suffix != ".gz":
        yield from json_lines(path)
        return
    with errors_about(path, fix="was the run cut off?"), open_text(path) as file:
        if is_array:
            values = json.load(file)
        else:
            values = [json.loads(line) for line in file if line.strip()]
    for number, value in enumerate(values, 1):
        where = f"{path}, sample {number}"
        if not isinstance(value, dict):
            raise ContractError(
                f"{where}: expected a JSON object, got {str(value)[:60]!r}"
            )
        yield where, value


def number(value: Any, where: str) -> float:
    """A score, which a table has as text, as a number. True is 1. ContractError for anything
    else."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float({"true": "1", "false": "0"}.get(value.lower(), value))
    if isinstance(value, (int, float)) and abs(value) <= 1e12:
        return float(value)
    raise ContractError(f"{where} is {value!r}; expected a finite number")


def short_text(value: Any) -> str:
    """A question or an answer as items keep it for the page; "" for what is no text."""
    return value[:LONGEST_TEXT] if isinstance(value, str) else ""


def first_of(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of these fields that is a text or a number, as text; "" if there is none."""
    return next(
        (
            str(values[name])
            for name in names
            if isinstance(values.get(name), (str, int))
        ),
        "",
    )
