"""VLMEvalKit's tables of judged answers, ``MODEL_DATASET[_JUDGE]_result.xlsx`` and the like (or
.tsv, .json).

The score is the column ``hit``, ``score`` or ``eval_score``; circular benchmarks have one row for
all turns of a question there. MME, POPE and MMVP become their composites. Tables of answers without
a score are scored where that needs no judge (``vlmevalkit_rules.py``).
"""

import ast
import csv
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llava_integration.evaluator.compare.readers import (
    IMAGES,
    Choices,
    Log,
    Reader,
    first_of,
    mme_logs,
    number,
    short_text,
)
from llava_integration.evaluator.compare.readers.cider import cider
from llava_integration.evaluator.compare.readers.file_formats import (
    columns,
    ending_of,
    table,
)
from llava_integration.evaluator.compare.readers.harness_lines import ALONE
from llava_integration.evaluator.compare.readers.vlmevalkit_rules import (
    Rule,
    nearness,
    rule_of,
    truths_of,
)
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

SCORES = ("hit", "score", "eval_score", "verifier_match")
JUDGE = r"_(exact_matching|openai|chatgpt[\w.-]*?|gpt[\w.-]*?)"
JUDGED = r"_(auxmatch|result|results|detailed_results|score)"
# of a table that is named by its judge alone: MODEL_MMVet_gpt-4-turbo.xlsx
JUDGE_ALONE = r"_(exact_matching|openai|chatgpt[a-zA-Z\d.-]*|gpt[a-zA-Z\d.-]*)"
ENDING = re.compile(rf"(({JUDGE})?{JUDGED}|{JUDGE_ALONE})$")
TABLES = (".xlsx", ".tsv", ".json")
CIDER = "CIDEr of a row"  # not in the table, but computed of all its captions


def fits(path: Path) -> bool:
    """It has the columns index, prediction and a score's, or is a table of predictions of which
    there is no judged one."""
    is_excel = ending_of(path) == ".xlsx"
    is_judged = ENDING.search(path.stem) is not None
    if is_excel and not is_judged and has_judged_table(path):
        return False  # predictions, which are in the judged table, too; opening them takes seconds
    names = columns_of(path)
    if {"index", "prediction"} <= names:
        # read() says so if there is no score
        return bool(names & set(SCORES)) or is_excel or not has_judged_table(path)
    return is_excel and is_judged and not names  # read() says what is wrong with it


def is_own(path: Path) -> bool:
    """Whether a table is VLMEvalKit's, by its columns or by a judged table of its answers."""
    return has_judged_table(path) or {"index", "prediction"} <= columns_of(path)


def columns_of(path: Path) -> set[str]:
    """The columns of a table; none of a JSON file that is no list of rows."""
    return set(columns(path))


def has_judged_table(path: Path) -> bool:
    """Whether there is a table with scores of these answers next to it."""
    for other in path.parent.glob(f"{glob.escape(path.stem)}_*"):
        if ending_of(other) in TABLES and unjudged_stem(other) == path.stem:
            names = columns_of(other)
            if "index" in names and names & set(SCORES):
                return True
    return False


def unjudged_stem(path: Path) -> str:
    """A table's name without what it says about the judge, whom nobody need know if the table of
    answers is there: MODEL_DATASET_JUDGE.xlsx next to MODEL_DATASET.xlsx."""
    if ENDING.search(path.stem):
        return ENDING.sub("", path.stem)
    answers, _, _ = path.stem.rpartition("_")
    for ending in TABLES:
        if answers and path.with_name(f"{answers}{ending}").is_file():
            return answers
    return path.stem


def read(path: Path, choices: Choices) -> Iterator[Log]:
    """One table; of MME perception and cognition, of several splits a number each."""
    lines = table(path)
    _, names = next(lines, ("", []))
    score_columns = [name for name in SCORES if name in names]
    column = choices.metric or next(iter(score_columns), "")
    check_columns(path, names, column, choices)
    judged = Table.of(path, names, column, choices.group)
    if not column and not judged.is_caption and judged.rule is None:
        problem = f"{path} has answers but none of the scores {', '.join(SCORES)}; judge it first"
        yield Log(benchmark=path.stem, metrics={}, items=[], unknown=problem)
        return
    rows = [(where, dict(zip(names, cells, strict=False))) for where, cells in lines]
    if judged.is_caption:
        yield caption_log(judged, rows)
        return
    items = []
    split_of: dict[str, str] = {}
    for where, row in rows:
        item = judged.item(row, where)
        split_of[item["id"]] = str(row.get("split") or "")
        if judged.is_pope:
            items += pope_items(item, row)
        else:
            items.append(item)
    notes = [] if {*judged.cluster_columns} & {*names} else [ALONE]
    if not column:
        notes.append(
            f"{judged.data}: the table has no scores; its answers are scored by VLMEvalKit's rule"
        )
    splits = sorted(set(split_of.values()))
    if column == "hit" and len(splits) > 1:  # MMMU_DEV_VAL: a number for each
        for split in splits:
            of_split = [item for item in items if split_of[item["id"]] == split]
            overall = _printed(judged.stem, split).get("Overall")
            yield judged.log(f"{judged.data} {split}", of_split, overall, notes)
        return
    printed = _printed(judged.stem)
    if judged.is_mme:
        for item in items:
            item["cluster"] = f"{item['category']}/{item['cluster']}"
        numbers = [printed.get(part) for part in ("perception", "reasoning")]
        yield from mme_logs(items, numbers, model=judged.model)
        return
    if judged.data == "MMVP":
        items = pairs_of_rows(items)
    overall = printed.get("Overall")
    if overall is not None and column != "hit":
        overall = overall / 100
    if "Final Score" in printed:  # OCRBench's, a count
        overall = printed["Final Score"] / len(items)
    if len(items) > len(split_of):
        notes.append(f"{len(split_of):,} questions, each counted in all of its parts")
    name = "pope" if judged.is_pope else judged.data
    yield judged.log(name, items, overall, notes)


def caption_log(captions: "Table", rows: Sequence[tuple[str, dict[str, Any]]]) -> Log:
    """CIDEr as VLMEvalKit computes it: captions are split at spaces."""
    texts = [str(row.get("prediction")) for _, row in rows]
    references = [truths_of(row.get("answer")) for _, row in rows]
    scores = cider(texts, references, words_of=str.split)
    items = []
    for (where, row), score in zip(rows, scores, strict=True):
        items.append(captions.item({**row, CIDER: score}, where))
    printed = _printed(captions.stem).get("CIDEr")
    if printed is not None:
        printed = printed / 100
    notes = [
        f"{captions.data}: CIDEr is compared; document frequencies are those of all references"
    ]
    log = captions.log(captions.data, items, printed, notes)
    return replace(log, aggregate="CIDEr")


def check_columns(
    path: Path, names: Sequence[str], column: str, choices: Choices
) -> None:
    """Raises ContractError for a table without the columns of an answer and its score, or of a
    choice."""
    for choice in (choices.group, choices.metric):
        if choice and choice not in names:
            raise ContractError(
                f"{path} has no column {choice}; its columns: {', '.join(names)}"
            )
    for name in ("index", "prediction", column):
        if name and names.count(name) > 1:
            raise ContractError(
                f"{path} has {names.count(name)} columns {name}; remove all but one"
            )
    has_answers = {"index", "prediction"} <= set(names)
    if "index" not in names or not (column or has_answers):
        raise ContractError(
            f"{path} has the columns {names}; expected index and one of {', '.join(SCORES)}"
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of judged answers."""

    stem: Path  # without what its name says about the judge
    model: str  # the folder that the file's name begins with; "" if none does
    data: str  # the benchmark
    column: str  # of the score
    cluster_columns: tuple[str, ...]  # the first of these tells what goes together
    is_mme: bool
    is_pope: bool
    is_caption: bool  # answers without scores, of which CIDEr can be computed
    rule: Rule | None  # of answers without scores

    @classmethod
    def of(
        cls, path: Path, names: Sequence[str], column: str, group: str = ""
    ) -> "Table":
        """The table of a file with these columns."""
        stem = unjudged_stem(path)
        model = ""
        for folder in path.parents:
            if folder.name and stem.startswith(f"{folder.name}_"):
                model = folder.name
                break
        data = stem.removeprefix(f"{model}_") if model else stem
        is_extracted = "extracted" in names
        is_caption = not column and data.startswith("COCO") and "answer" in names
        return cls(
            stem=path.with_name(stem),
            model=model,
            data=data,
            column=CIDER if is_caption else column,
            cluster_columns=(group,) if group else IMAGES[:-1],
            is_mme=data.lower() == "mme" and is_extracted,
            is_pope=data.lower() == "pope" and is_extracted,
            is_caption=is_caption,
            rule=rule_of(data) if "answer" in names else None,
        )

    def item(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """The item of a row."""
        name = str(row["index"])
        category = str(row.get("category") or "")
        answer = str(row.get("prediction"))
        with errors_about(where):
            if self.column:
                score = _score(self.data, row, self.column, f"{where}: {self.column}")
            else:
                assert self.rule is not None
                score = self.rule(answer, truths_of(row.get("answer")), category)
        item = {
            "id": name,
            "score": score,
            "category": category,
            "question": short_text(row.get("question")),
            "answer": short_text(answer),
            "truth": row.get("answer"),
            "cluster": first_of(row, self.cluster_columns) or name,
        }
        options = options_of(row)
        if len(options) > 1:
            item["choices"] = options
            if "g_index" in row:  # of a circular benchmark, a turn for each option
                item["turns"] = len(options)
        return item

    def log(
        self,
        benchmark: str,
        items: list[dict[str, Any]],
        printed: float | None,
        notes: list[str],
    ) -> Log:
        """The log of these items."""
        return Log(
            benchmark=benchmark,
            metrics={},
            items=items,
            model=self.model,
            printed=printed,
            notes=notes,
        )


def options_of(row: dict[str, Any]) -> list[str]:
    """The options in the columns A, B and so on, up to the first that is empty."""
    options = []
    for letter in ascii_uppercase:
        cell = row.get(letter)
        if cell is None or str(cell).strip() in ("", "nan"):
            break
        options.append(short_text(str(cell)))
    return options


def pope_items(item: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """A question of POPE in each of its parts ("random,popular"), in which VLMEvalKit counts it."""
    answers = {
        "parsed": str(row.get("extracted")).lower(),
        "label": str(row.get("answer")).lower(),
        "category": "",
    }
    items = []
    for part in item["category"].split(","):
        items.append({**item, **answers, "id": f"{item['id']}/{part}"})
    return items


def pairs_of_rows(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """MMVP's pairs of images, which are in two rows: right if both are."""
    pairs = []
    for first, second in zip(items[0::2], items[1::2], strict=False):
        score = int(first["score"] and second["score"])
        pairs.append({**first, "score": score, "truth": None, "turns": 2})
    return pairs


def _score(data: str, row: dict[str, Any], column: str, where: str) -> float:
    """A row's score: the column's value, or what VLMEvalKit makes of a row's matches with several
    answers."""
    matches = matches_in(row.get("eval_match"), where)
    if matches and data.startswith(("DocVQA", "InfoVQA")):  # distances
        return nearness(min(matches))
    if matches and data.startswith(("ChartQA", "OCRVQA")):
        return max(matches)
    return number(row.get(column), where)


def matches_in(cell: Any, where: str) -> list[float]:
    """The numbers of a cell that lists them; ContractError for anything else."""
    text = str(cell or "[]")
    try:
        return [float(match) for match in ast.literal_eval(text)]
    # literal_eval raises MemoryError for a text that is nested too deep
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ContractError(
            f"{where}: eval_match is {text[:60]!r}; expected a list of numbers"
        ) from error


def _printed(stem: Path, split: str = "Overall") -> dict[str, float]:
    """The numbers that VLMEvalKit wrote next to a table, by name: of a split or of all, or of the
    only one."""
    for ending in ("acc", "score"):
        path = stem.with_name(f"{stem.name}_{ending}.csv")
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                return numbers_of(list(csv.DictReader(file)), split)
    path = stem.with_name(f"{stem.name}_score.json")
    if path.is_file():
        with errors_about(path):
            numbers = read_json_value(path)
            return numbers_of([numbers] if isinstance(numbers, dict) else [], split)
    return {}


PRINTED = ("Overall", "perception", "reasoning", "Final Score", "CIDEr")


def numbers_of(rows: Sequence[dict[str, Any]], split: str) -> dict[str, float]:
    """The numbers in a table of results, in the row of a split or the only one."""
    row = rows[0] if len(rows) == 1 else {}
    for candidate in rows:
        if candidate.get("split") == split:
            row = candidate
            break
    numbers = {}
    for name in PRINTED:
        if row.get(name) not in (None, ""):
            numbers[name] = float(row[name])
    return numbers


READER = Reader(
    name="VLMEvalKit",
    endings=TABLES,
    fits=fits,
    read=read,
    choices=("group", "metric"),
)
