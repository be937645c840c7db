"""MMBench dev, circular: a question is right only if every rotation of its options is answered right.

Rules: VLMEvalKit's exact matching on what LLaVA's ``convert_mmbench_for_submission.py`` writes (the headline), and
lmms-eval's static one (``lmms_eval_static``). Neither asks a judge: what they cannot read counts as wrong, whereas the
MMBench server lets a GPT model read it, so its numbers are a little higher. Quirks kept: the article 'A' alone is
option A; an option text contained in another is ambiguous; texts that pandas takes for missing values ('None', 'NA')
are no options, and as answers they are 'nan'. ``corrected`` is without the pandas quirk.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_text
from llava_integration.benchmarks.base import (
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    by_group,
    flatten,
    mean,
    mean_statistic,
    need_file,
)
from llava_integration.benchmarks.match import match
from llava_integration.benchmarks.mmbench_letters import letter_lmms_eval, letter_vlmevalkit, mcq_letter
from llm2clip_plugin.contracts import whole_file

ROTATION = 1_000_000  # index = group + rotation x this
# What pandas reads as a missing value: official scripts load tables and spreadsheets through it.
PANDAS_MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null"}
)  # fmt: skip
SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of MMBench's TSV; its images are base64 in a column, larger than csv's default field."""
    csv.field_size_limit(1 << 28)
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    needed = {"index", "question", "A", "B", "answer"}
    if not rows or not needed <= set(rows[0]):
        have = sorted(key for key in rows[0] if key) if rows else []
        raise ValueError(f"{path} lacks the columns {sorted(needed - set(have))}; it has {have} (tab separated)")
    return rows


def load(table: Path) -> list[Question]:
    """One question a row of the table (a rotation), in its order."""
    rows = read_table(table)
    by_index = {row["index"]: row for row in rows}
    whole = len({row.get("image", "") for row in rows}) > 1  # else the table is without its images
    questions = []
    for row in rows:
        image = row.get("image") or ""
        if image in by_index:  # newer tables name the row that holds the picture
            image = by_index[image].get("image") or ""
        group = int(row["index"]) % ROTATION
        if row["answer"] not in tuple("ABCD"):
            raise ValueError(
                f"{table} has no answer to index {row['index']}: the test split is scored by the server; "
                "use --submission FILE"
            )
        questions.append(
            Question(
                id=int(row["index"]),
                text=row["question"],
                cluster=hashlib.sha256(image.encode()).hexdigest()[:16] if image and whole else f"group {group}",
                truth=row["answer"],
                image=str(group),
                category=row.get("category") or "",
                extra={"row": row, "group": group, "l2": row.get("l2-category") or "", "split": row.get("split") or ""},
            )
        )
    return questions


def choices(row: dict[str, str], *, missing: frozenset[str] = PANDAS_MISSING) -> dict[str, str]:
    """The options of a row by letter."""
    return {letter: row[letter] for letter in "ABCD" if row.get(letter) is not None and row[letter] not in missing}


def logged_key(row: Row) -> str | None:
    """The row's index in an lmms-eval row."""
    for entry in (row.get("gpt_eval_score"), row.get("submission"), row.get("doc")):
        if isinstance(entry, dict) and "index" in entry:
            return str(entry["index"])
    return None


def loader(name: str, patterns: tuple[str, ...]) -> Callable[[Path], list[Question]]:
    """The loading function of one language's table."""
    where = "https://github.com/open-compass/MMBench"
    return lambda folder: load(need_file(folder, *patterns, benchmark_name=name, where=where))


def scorer(name: str, patterns: tuple[str, ...]) -> Callable[[Path, Answers, Options], Scored]:
    """The scoring function of one language's table."""

    def score(folder: Path, answers: Answers, options: Options) -> Scored:
        """Circular accuracy by both rules, by category."""
        questions = loader(name, patterns)(folder)
        matched = match(
            questions,
            answers,
            options,
            name=name,
            logged_key=logged_key,
        )
        rows = [score_row(question, answer) for question, answer in zip(questions, matched.answers, strict=True)]
        items = circular(questions, rows)
        counts = {**matched.counts, "unread": sum(row["inferred"] is None and not row["missing"] for row in rows)}
        return Scored(metrics=numbers(items, rows, options), items=items, counts=counts, notes=matched.notes)

    return score


def score_row(question: Question, answer: Answer | None) -> Item:
    """One rotation: the letter that each rule reads."""
    row = question.extra["row"]
    said = answer.text or "" if answer else ""
    text = "nan" if said in PANDAS_MISSING else said  # through a spreadsheet and back
    options = choices(row)
    letter = letter_vlmevalkit(text, options)
    prefetched = letter_lmms_eval(said.strip(), options)
    corrected = letter_vlmevalkit(said, choices(row, missing=frozenset({""})))
    return {
        "index": question.id,
        "inferred": letter,
        "answer": question.truth,
        "correct": int(letter == question.truth),
        "prefetched_lmms_eval": prefetched,
        "correct_lmms_eval": int((prefetched or mcq_letter(said.strip(), sorted(options))) == question.truth),
        "correct_corrected": int(answer is not None and corrected == question.truth),
        "text": said,
        "missing": answer is None,
    }


def circular(questions: Sequence[Question], rows: Sequence[Item]) -> list[Item]:
    """Items: one a group of rotations whose first rotation is in the table."""
    groups: dict[int, list[tuple[Question, Item]]] = {}
    for question, row in zip(questions, rows, strict=True):
        groups.setdefault(question.extra["group"], []).append((question, row))
    items = []
    for group, members in groups.items():
        first = next((pair for pair in members if pair[0].id == group), None)
        if first is None:
            continue  # the official rule leaves such a group out
        question, row = first
        items.append(
            {
                "id": group,
                "score": int(all(member["correct"] for _, member in members)),
                "cluster": question.cluster,
                "g_index": group,
                "hit_vlmevalkit": int(all(member["correct"] for _, member in members)),
                "hit_lmms_static": int(all(member["correct_lmms_eval"] for _, member in members)),
                "hit_corrected": int(all(member["correct_corrected"] for _, member in members)),
                "answer": row["text"],
                "missing": any(member["missing"] for _, member in members),
                "truth": question.truth,
                "question": question.text,
                "choices": list(choices(question.extra["row"]).values()),
                "category": question.category,
                "l2_category": question.extra["l2"],
                "split": question.extra["split"],
                "image": question.image,
                "rows": [member for _, member in members],
            }
        )
    return items


def numbers(items: Sequence[Item], rows: Sequence[Item], options: Options) -> dict[str, float]:
    """The metrics of both rules, and the accuracy of single rotations."""
    by_ability = {
        SHORT.get(key, key): mean(v) for key, v in by_group(items, "l2_category", "hit_vlmevalkit").items() if key
    }
    by_category = {key: mean(v) for key, v in by_group(items, "category", "hit_vlmevalkit").items() if key}
    static = {
        "overall": mean([item["hit_lmms_static"] for item in items]),
        "category": {key: mean(v) for key, v in by_group(items, "category", "hit_lmms_static").items() if key},
        "l2_category": {key: mean(v) for key, v in by_group(items, "l2_category", "hit_lmms_static").items() if key},
    }
    metrics = flatten(
        {
            "vlmevalkit_exact_matching": {
                "overall": mean([item["score"] for item in items]),
                "by_l2_and_category": {**by_ability, **by_category},
                "n_groups": len(items),
                "hits": sum(item["score"] for item in items),
            },
            "lmms_eval_static": static,
            "vanilla": {
                "all_rows": mean([row["correct"] for row in rows]),
                "index_lt_1e6": mean([row["correct"] for row in rows if row["index"] < ROTATION]),
            },
        }
    )
    if options.corrected:
        metrics["corrected_overall"] = mean([item["hit_corrected"] for item in items])
    return metrics


def statistic(items: Sequence[Item]) -> Statistic:
    """Circular accuracy, percent: an item is a whole group of rotations."""
    return mean_statistic([item["score"] for item in items])


def image_bytes(
    folder: Path, item: Item, patterns: tuple[str, ...] = ("mmbench_dev_2*.tsv", "mmbench*.tsv")
) -> bytes | None:
    """The picture of a group, out of the table's base64 column."""
    for pattern in patterns:
        for table in sorted(folder.glob(pattern)):
            encoded = _encoded_images(table).get(str(item["image"]))
            if encoded:
                try:
                    return base64.b64decode(encoded, validate=True)
                except binascii.Error:
                    return None
    return None


def _encoded_images(table: Path) -> dict[str, str]:
    key = str(table.resolve())
    if key not in _IMAGES:
        _IMAGES.clear()  # one table at a time: it holds every picture
        _IMAGES[key] = {row["index"]: row.get("image") or "" for row in read_table(table)}
    return _IMAGES[key]


_IMAGES: dict[str, dict[str, str]] = {}


def submitter(patterns: tuple[str, ...]) -> Callable[[Path, Answers, Path], None]:
    """The function that writes the table for the server, of one language."""

    def submission(folder: Path, answers: Answers, output: Path) -> None:
        """The converter's spreadsheet (.xlsx), or its rows as JSONL (any other name)."""
        table = need_file(folder, *patterns, benchmark_name="mmbench", where="https://github.com/open-compass/MMBench")
        texts = {str(answer.id): answer.text for answer in answers.rows}
        dropped = {"hint", "category", "source", "image", "comment", "l2-category", "prediction"}
        rows = []
        for row in read_table(table):
            kept = {key: value if value != "" else None for key, value in row.items() if key not in dropped}
            values = {**kept, "index": int(row["index"])}
            ordered = list(values)
            ordered.insert(6, "prediction")  # where the official converter puts it
            rows.append(
                {key: texts.get(row["index"]) or None if key == "prediction" else values[key] for key in ordered}
            )
        with whole_file(output) as aside:
            if output.suffix == ".xlsx":
                from llava_integration.benchmarks.xlsx import write_xlsx

                write_xlsx(aside, rows)
            else:
                aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    return submission


PATTERNS = ("mmbench_dev_2*.tsv", "mmbench_dev_en*.tsv", "mmbench_test_2*.tsv", "mmbench_test_en*.tsv")
BENCHMARK = Benchmark(
    name="mmbench",
    title="MMBench",
    headline="vlmevalkit_exact_matching.overall",
    scale=100.0,
    folders=("mmbench",),
    questions=PATTERNS,
    tasks=("mmbench_en_dev", "mmbench_en_dev_static", "mmbench_en_dev_lite", "mmbench_en"),
    annotations=PATTERNS,
    load=loader("mmbench", PATTERNS),
    score=scorer("mmbench", PATTERNS),
    statistic=statistic,
    submission=submitter(PATTERNS),
    image_bytes=image_bytes,
)
