"""VLMEvalKit's tables of judged answers, ``MODEL_DATASET[_JUDGE]_result.xlsx`` and the like (or
.tsv, .json).

The score is the column ``hit``, ``score`` or ``eval_score``; circular benchmarks have one row for
all turns of a question there. MME, POPE and MMVP become their composites.
"""

import ast
import csv
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_integration.evaluator.compare.readers import (
    IMAGES,
    Choices,
    Log,
    Reader,
    columns,
    first_of,
    mme_logs,
    number,
    short_text,
    table,
)
from llava_integration.evaluator.compare.readers.lm_eval import ALONE
from llm2clip_plugin.errors import ContractError, errors_about

SCORES = ("hit", "score", "eval_score", "verifier_match")
JUDGE = r"_(exact_matching|openai|chatgpt[\w.-]*?|gpt[\w.-]*?)"
JUDGED = r"_(auxmatch|result|results|detailed_results|score)"
# of a table that is named by its judge alone: MODEL_MMVet_gpt-4-turbo.xlsx
JUDGE_ALONE = r"_(exact_matching|openai|chatgpt[a-zA-Z\d.-]*|gpt[a-zA-Z\d.-]*)"
ENDING = re.compile(rf"(({JUDGE})?{JUDGED}|{JUDGE_ALONE})$")
TABLES = (".xlsx", ".tsv", ".json")
ANLS_THRESHOLD = 0.5  # a nearness below is none


def fits(path: Path) -> bool:
    """It has the columns index, prediction and a score's, or is an Excel table of predictions of
    which there is no judged one."""
    with path.open("rb") as file:
        if path.suffix == ".json" and file.read(1) != b"[":
            return False
    is_judged = ENDING.search(path.stem) is not None
    if path.suffix == ".xlsx" and not is_judged and has_judged_table(path):
        return False  # predictions, which are in the judged table, too; opening them takes seconds
    names = set(columns(path))
    if path.suffix == ".xlsx" and {"index", "prediction"} <= names:
        return True  # read() says so if there is no score
    if path.suffix == ".xlsx" and not is_judged:
        return False
    if path.suffix == ".xlsx" and not names:
        return True  # read() says what is wrong with it
    return {"index", "prediction"} <= names and bool(names & set(SCORES))


def has_judged_table(path: Path) -> bool:
    """Whether there is a table next to it that its name begins."""
    tables = path.parent.glob(f"{glob.escape(path.stem)}_*")
    return any(table.suffix in TABLES for table in tables)


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """One table; of MME perception and cognition. The model is the folder that the file's name
    begins with."""
    lines = table(path)
    _, names = next(lines)
    column = next((name for name in SCORES if name in names), "")
    for choice in filter(None, (choices.group, choices.metric)):
        if choice not in names:
            raise ContractError(
                f"{path} has no column {choice}; its columns: {', '.join(names)}"
            )
    column = choices.metric or column
    cluster_columns = (choices.group,) if choices.group else IMAGES[:-1]
    if {"index", "prediction"} <= set(names) and not column:
        problem = f"{path} has answers but none of the scores {', '.join(SCORES)}; judge it first"
        yield Log(benchmark=path.stem, metrics={}, items=[], unknown=problem)
        return
    if "index" not in names or not column:
        raise ContractError(
            f"{path} has the columns {names}; expected index and one of {', '.join(SCORES)}"
        )
    stem = ENDING.sub("", path.stem)
    model = next(
        (p.name for p in path.parents if p.name and stem.startswith(f"{p.name}_")), ""
    )
    data = stem.removeprefix(f"{model}_") if model else stem
    kind = next(
        (
            kind
            for kind in ("mme", "pope")
            if data.lower() == kind and "extracted" in names
        ),
        "",
    )
    items = []
    split_of: dict[str, str] = {}
    for where, cells in lines:
        row = dict(zip(names, cells, strict=False))
        name = str(row["index"])
        parts = str(row.get("category") or "")
        with errors_about(where):
            score = _score(data, row, column, f"{where}: {column}")
        item = {"id": name, "score": score, "category": parts}
        item |= {
            "question": short_text(row.get("question")),
            "answer": short_text(str(row.get("prediction"))),
        }
        item |= {
            "truth": row.get("answer"),
            "cluster": first_of(row, cluster_columns) or name,
        }
        split_of[name] = str(row.get("split") or "")
        if kind != "pope":
            items.append(item)
            continue
        said = {
            "parsed": str(row.get("extracted")).lower(),
            "label": str(row.get("answer")).lower(),
            "category": "",
        }
        # VLMEvalKit counts a question in each of its parts ("random,popular")
        items += [{**item, **said, "id": f"{name}/{part}"} for part in parts.split(",")]
    splits = sorted(set(split_of.values()))
    notes = [] if {*cluster_columns} & {*names} else [ALONE]
    if column == "hit" and len(splits) > 1:  # MMMU_DEV_VAL: a number for each
        for split in splits:
            of_split = [item for item in items if split_of[item["id"]] == split]
            yield Log(
                benchmark=f"{data} {split}",
                metrics={},
                items=of_split,
                model=model,
                printed=_printed(path.parent / stem, split).get("Overall"),
                notes=notes,
            )
        return
    printed = _printed(path.parent / stem)
    if kind == "mme":
        items = [
            {**item, "cluster": f"{item['category']}/{item['cluster']}"}
            for item in items
        ]
        yield from mme_logs(
            items,
            [printed.get(part) for part in ("perception", "reasoning")],
            model=model,
        )
        return
    if data == "MMVP":  # two images of a pair, in two rows
        both = zip(items[0::2], items[1::2], strict=False)
        items = [
            {**one, "score": int(one["score"] and other["score"]), "truth": None}
            for one, other in both
        ]
    overall = printed.get("Overall")
    overall = overall / 100 if overall is not None and column != "hit" else overall
    if len(items) > len(split_of):
        notes.append(f"{len(split_of):,} questions, each counted in all of its parts")
    yield Log(
        benchmark=kind or data,
        metrics={},
        items=items,
        model=model,
        printed=overall,
        notes=notes,
    )


def _score(data: str, row: dict[str, Any], column: str, where: str) -> float:
    """A row's score: the column's value, or what VLMEvalKit makes of a row's matches with several
    answers."""
    matches = [
        float(one) for one in ast.literal_eval(str(row.get("eval_match") or "[]"))
    ]
    if matches and data.startswith(("DocVQA", "InfoVQA")):  # distances
        return 1 - min(matches) if min(matches) <= 1 - ANLS_THRESHOLD else 0.0
    if matches and data.startswith(("ChartQA", "OCRVQA")):
        return max(matches)
    return number(row.get(column), where)


def _printed(stem: Path, split: str = "Overall") -> dict[str, float]:
    """The numbers that VLMEvalKit wrote next to a table, by name: of a split or of all, or of the
    only one."""
    for path in (
        stem.with_name(f"{stem.name}_{ending}.csv") for ending in ("acc", "score")
    ):
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            row = next(
                (row for row in rows if row.get("split") == split),
                rows[0] if len(rows) == 1 else {},
            )
            return {
                name: float(row[name])
                for name in ("Overall", "perception", "reasoning")
                if row.get(name)
            }
    return {}


READER = Reader(
    name="VLMEvalKit",
    endings=TABLES,
    fits=fits,
    read=read,
    choices=("group", "metric"),
)
