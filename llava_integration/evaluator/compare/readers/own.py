"""Our own forms: score files, and tables (CSV, TSV, JSONL, an array in JSON, Excel) of item, score
and, where there are such, group and more.

Those of ``evaluate`` become one for each recall: in each direction, overall and by part. Their
items are queries with ``side`` (i2t, t2i), ``part`` ("all", "long:en" ...) and a hit for each k
(``r1`` ...); SugarCrepe's are pairs of captions without a side, whose ``part`` is one of seven
groups. XM3600's languages have each their own candidates.

Of a table, ``item`` (or ``id``, ``question_id``) and ``score`` (or ``correct``) must be there.
``group`` (or ``cluster``, ``image``): what is resampled together. ``task`` and ``run`` (or
``seed``) split a table into benchmarks and runs, ``model`` into sides.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    BY_PART,
    OWN,
    Choices,
    Log,
    Reader,
    number,
    vlmevalkit,
)
from llava_integration.evaluator.compare.readers.file_formats import (
    EXCEL,
    JSON_TABLES,
    TABLES,
    columns,
    ending_of,
    table,
    unread_sheets,
)
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError

OVERALL = "all"  # the part with every caption
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
# more would dominate the table, and Holm's correction costs every row power
MOST_PARTS = 8


def scores_fits(path: Path) -> bool:
    """It is named as a score file, or begins with the name of their kind."""
    with path.open("rb") as file:
        return path.name.endswith(
            ".scores.json"
        ) or ScoreFile.KIND.encode() in file.read(100)


def scores_read(path: Path) -> Iterator[Log]:
    """One for each part, direction and k if the items are queries; else the file itself."""
    record = Log(**vars(ScoreFile.read(path)))
    name = record.benchmark.removeprefix("retrieval:")
    items = record.items
    by_part = [{**item, "category": item.get("part")} for item in items]
    if record.benchmark == "retrieval:sugarcrepe":
        yield replace(record, benchmark=name, items=by_part, aggregate=BY_PART)
        return
    if not items or any("side" not in item or "r1" not in item for item in items):
        yield record
        return
    parts: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        parts.setdefault(str(item.get("part", OVERALL)), []).append(item)
    if record.benchmark == "retrieval:xm3600":
        record = replace(record, aggregate=BY_PART)
        of_languages = [
            item for item in by_part if item["category"] not in (None, OVERALL)
        ]
        parts = {OVERALL: of_languages or by_part}
    elif len(parts) > MOST_PARTS + 1:
        note = f"{len(parts)} parts: only the overall number is compared"
        record = replace(record, notes=[*record.notes, note])
        compared = [OVERALL] if OVERALL in parts else list(parts)[:MOST_PARTS]
        parts = {part: parts[part] for part in compared}
    for part, queries in parts.items():
        title = name if part == OVERALL else f"{name} {part}"
        recalls = ("r1", "r10") if part == OVERALL else ("r1",)
        for side, arrow in DIRECTIONS.items():
            of_side = [item for item in queries if item["side"] == side]
            for recall in recalls:
                if of_side and all(recall in item for item in of_side):
                    hits = [{**item, "score": item[recall]} for item in of_side]
                    yield replace(
                        record, benchmark=f"{title} {arrow} R@{recall[1:]}", items=hits
                    )


COLUMNS = {  # ours: theirs
    "id": ("item", "id", "question_id", "item_id", "sample_id", "example_id"),
    "score": ("score", "correct", "is_correct", "accuracy"),
    "cluster": ("group", "cluster", "image", "image_id"),
    "category": ("category",),
    "task": ("task", "benchmark"),
    "run": ("run", "seed"),
    "model": ("model",),
}


# names of columns whose lower values are better, as a rule
LOWER_IS_BETTER = re.compile(
    r"(?<![a-z])(loss|perplexity|ppl|error|wer|cer|mae|mse|rmse)(?![a-z])",
    re.IGNORECASE,
)


def _column_numbers(names: list[str]) -> dict[str, int]:
    """Where each of our columns is in a table."""
    numbers = {}
    plain_names = [str(name).strip().lower() for name in names]
    for ours, theirs in COLUMNS.items():
        for name in theirs:
            if name in plain_names:
                numbers[ours] = plain_names.index(name)
                break
    return numbers


def check_distinct(path: Path, names: list[str]) -> None:
    """Raises ContractError for a table with one of our columns twice: one would be lost."""
    our_names = {name for theirs in COLUMNS.values() for name in theirs}
    counts = Counter(str(name).strip().lower() for name in names)
    for name, count in counts.items():
        if name in our_names and count > 1:
            raise ContractError(
                f"{path} has {count} columns {name}; remove or rename all but one"
            )


def is_table(path: Path) -> bool:
    """It has the columns of an item and a score, and is no table of VLMEvalKit's."""
    if ending_of(path) in vlmevalkit.TABLES and vlmevalkit.is_own(path):
        return False
    return {"id", "score"} <= set(_column_numbers(columns(path)))


def is_table_with(path: Path, metric: str) -> bool:
    """It has the columns of an item and of the chosen score, and is no table of VLMEvalKit's."""
    if ending_of(path) in vlmevalkit.TABLES and vlmevalkit.is_own(path):
        return False
    names = columns(path)
    return metric in names and "id" in _column_numbers(names)


def text_of(cell: Any) -> str:
    """A cell as text; "" for an empty one."""
    return "" if cell is None else str(cell)


def table_read(path: Path, choices: Choices) -> Iterator[Log]:
    """One for each task, run and model."""
    lines = table(path, formulas=False)
    _, header = next(lines)
    names = [text_of(name) for name in header]
    check_distinct(path, names)
    column_numbers = _column_numbers(names)
    for ours, column in {"cluster": choices.group, "score": choices.metric}.items():
        if column and column not in names:
            raise ContractError(
                f"{path} has no column {column}; its columns: {', '.join(names)}"
            )
        if column:
            column_numbers[ours] = names.index(column)
    tables: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for where, cells in lines:
        if len(cells) != len(names):
            raise ContractError(f"{where}: {len(cells)} cells, not {len(names)}")
        row = {ours: cells[column] for ours, column in column_numbers.items()}
        if not text_of(row["id"]):
            raise ContractError(f"{where}: no {names[column_numbers['id']]}")
        item = {
            "id": str(row["id"]),
            "score": number(row["score"], f"{where}: {names[column_numbers['score']]}"),
        }
        # without a group the item is one by itself
        item["cluster"] = text_of(row.get("cluster")) or item["id"]
        item["category"] = text_of(row.get("category"))
        task = text_of(row.get("task")) or path.stem
        run = text_of(row.get("run"))
        model = text_of(row.get("model"))
        tables.setdefault((task, run, model), []).append(item)
    if not tables:
        raise ContractError(f"{path} has no items below its first line")
    score_name = str(names[column_numbers["score"]])
    notes = []
    if LOWER_IS_BETTER.search(score_name):
        notes.append(
            f"{score_name}: a higher value counts as better; if it is worse, negate the column"
        )
    if ending_of(path) == EXCEL and (sheets := unread_sheets(path)):
        notes.append(
            f"{path}: only the first sheet is read, not {', '.join(sheets)}; "
            "save each sheet as a file"
        )
    for (task, run, model), items in tables.items():
        yield Log(
            benchmark=task,
            metrics={},
            items=items,
            model=model,
            run=run,
            notes=list(notes),
            named="task" in column_numbers,
        )


READER = [
    Reader(name=OWN, endings=(".json",), fits=scores_fits, read=scores_read),
    Reader(
        name="table",
        endings=(*TABLES, *JSON_TABLES, EXCEL),
        fits=is_table,
        fits_metric=is_table_with,
        read=table_read,
        choices=("group", "metric"),
    ),
]
