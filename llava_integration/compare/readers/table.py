"""A table of item, score and, where there are such, group and more: CSV, TSV or JSONL, with names in its first line.

``item`` (or ``id``, ``question_id``) and ``score`` (or ``correct``) must be there. ``group`` (or ``cluster``,
``image``): what is resampled together. ``task`` and ``run`` (or ``seed``) split a table into benchmarks and runs.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llava_integration.compare.readers import Log, Reader, first_object, number
from llm2clip_plugin.files import ContractError

COLUMNS = {  # ours: theirs
    "id": ("item", "id", "question_id"),
    "score": ("score", "correct"),
    "cluster": ("group", "cluster", "image", "image_id"),
    "category": ("category",),
    "task": ("task", "benchmark"),
    "run": ("run", "seed"),
}
WORDS = {"true": 1.0, "false": 0.0}
csv.field_size_limit(2**24)


def _columns(names: Any) -> dict[str, str]:
    """The table's name of each of our columns."""
    return {ours: one for ours, theirs in COLUMNS.items() if (one := next((t for t in theirs if t in names), ""))}


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def fits(path: Path) -> bool:
    """It has an item and a score."""
    if path.suffix == ".jsonl":
        names = set(first_object(path))
    else:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            names = set(next(csv.reader(file, delimiter=_delimiter(path)), []))
    return {"id", "score"} <= set(_columns(names))


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each line."""
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=_delimiter(path))
            for row in table:
                if None in row or None in row.values():
                    raise ContractError(f"{path}, line {table.line_num}: not {len(table.fieldnames or ())} columns")
                yield f"{path}, line {table.line_num}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ContractError(f"{path} is no table of UTF-8 text ({error})") from error


def read(path: Path) -> Iterator[Log]:
    """One for each task and run."""
    columns: dict[str, str] = {}
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for where, row in rows(path):
        columns = columns or _columns(row)
        got = {ours: row.get(theirs) for ours, theirs in columns.items()}
        if got["id"] in (None, ""):
            raise ContractError(f"{where}: no {columns['id']}")
        score = got["score"]
        if isinstance(score, str):
            try:
                score = WORDS[score.lower()] if score.lower() in WORDS else float(score)
            except ValueError:
                score = None if score == "" else score
        item = {"id": str(got["id"]), "score": number(score, f"{where}: {columns['score']}")}
        item["cluster"] = str(got.get("cluster") or item["id"])
        if got.get("category"):
            item["category"] = str(got["category"])
        tables.setdefault((str(got.get("task") or path.stem), str(got.get("run") or "")), []).append(item)
    if not tables:
        raise ContractError(f"{path} has no items below its first line")
    for (task, _), items in tables.items():
        yield Log(benchmark=task, metrics={}, items=items)


READER = Reader(name="table", endings=(".csv", ".tsv", ".jsonl"), fits=fits, read=read)
