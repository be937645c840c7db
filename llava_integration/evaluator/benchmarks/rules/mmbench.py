"""MMBench dev, circular: a question is right only if every rotation of its options is answered
right.

Rule: that of VLMEvalKit, MMBench's own evaluator, by exact matching on LLaVA's
``convert_mmbench_for_submission.py`` of the answers. It uses no judge: what it cannot read is
wrong, whereas the MMBench server has a GPT model read it, so its numbers are a little higher.
Quirks kept: the article 'A' alone is option A; an option text contained in another is ambiguous;
texts that pandas reads as missing values ('None', 'NA') are no options, and as answers they are
'nan'.
"""

import base64
import binascii
import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import (
    Answer,
    Answers,
    Row,
    read_text,
)

WHERE = "https://github.com/open-compass/MMBench"
ROTATION = 1_000_000  # index = group + rotation x this
# What pandas reads as a missing value: official scripts load tables and spreadsheets with it.
PANDAS_MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
     "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)  # fmt: skip
SHORT_NAMES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
NOT_SUBMITTED = {
    "hint",
    "category",
    "source",
    "image",
    "comment",
    "l2-category",
    "prediction",
}
PREDICTION_COLUMN = 6  # where the official converter puts it

# of VLMEvalKit's exact matching, at e8e78f0; golden answers in the tests pin it
API_FAILED = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
MARKS_AS_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
LAST_WORDS = 4  # a letter counts only among the last words


class MMBench(base.Benchmark):
    """Items are groups of rotations, questions single rotations."""

    def load(self, folder: Path) -> list[base.Question]:
        """One question per row of the table (a rotation), in its order."""
        table = self.require(folder, *self.question_files, where=WHERE)
        rows = read_table(table)
        by_index = {row["index"]: row for row in rows}
        with_images = len({row.get("image", "") for row in rows}) > 1
        questions = []
        for row in rows:
            image = row.get("image") or ""
            if image in by_index:  # newer tables name the row with the picture
                image = by_index[image].get("image") or ""
            group = int(row["index"]) % ROTATION
            if row["answer"] not in tuple("ABCD"):
                why = f"no answer to index {row['index']}: the test split is scored by the server"
                raise ValueError(f"{table} has {why}; write --submission FILE")
            cluster = f"group {group}"
            if image and with_images:
                cluster = hashlib.sha256(image.encode()).hexdigest()[:16]
            questions.append(
                base.Question(
                    id=int(row["index"]),
                    text=row["question"],
                    cluster=cluster,
                    truth=row["answer"],
                    image=str(group),
                    category=row.get("category") or "",
                    rule=row,
                )
            )
        return questions

    def items(
        self, questions: Sequence[base.Question], answers: Sequence[Answer | None]
    ) -> list[base.Item]:
        """One item for each group whose first rotation is in the table; the official rule ignores
        others."""
        groups: dict[int, list[tuple[base.Question, base.Item]]] = {}
        for question, row in zip(
            questions, super().items(questions, answers), strict=True
        ):
            groups.setdefault(int(question.id) % ROTATION, []).append((question, row))
        items = []
        for group, members in groups.items():
            rotations = [row for _, row in members]
            items += [
                _group_item(first, row, rotations)
                for first, row in members
                if first.id == group
            ]
        return items

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """One rotation: the letter that the rule reads."""
        text = base.text_of(answer)
        letter = letter_of(text, choices_of(question.rule))
        return {
            "index": question.id,
            "inferred": letter,
            "answer": question.truth,
            "correct": int(letter == question.truth),
            "text": text,
            "missing": answer is None,
        }

    def counts(self, items: Sequence[base.Item]) -> dict[str, int]:
        rows = [row for item in items for row in item["rows"]]
        return {
            "unread": sum(
                row["inferred"] is None and not row["missing"] for row in rows
            )
        }

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        """Circular accuracy, overall and by ability and category."""
        groups = {
            **base.by_group(items, "l2_category"),
            **base.by_group(items, "category"),
        }
        numbers = {
            "overall": base.mean_of(items),
            "by_l2_and_category": {
                SHORT_NAMES.get(key, key): base.mean(values)
                for key, values in groups.items()
                if key
            },
            "n_groups": len(items),
            "hits": sum(item["score"] for item in items),
        }
        return base.flatten({"vlmevalkit_exact_matching": numbers})

    def image_bytes(self, folder: Path, item: base.Item) -> bytes | None:
        """The picture of a group, from the table's base64 column."""
        table = base.first_file(folder, *self.question_files)
        encoded = _encoded_images(table).get(str(item["image"]), "") if table else ""
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error:
            return None

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """The rows of the official converter's table."""
        texts = {str(answer.id): answer.text for answer in answers.rows}
        rows = []
        for row in read_table(self.require(folder, *self.question_files, where=WHERE)):
            submitted = [
                (key, value) for key, value in row.items() if key not in NOT_SUBMITTED
            ]
            cells = [(key, None if value == "" else value) for key, value in submitted]
            cells.insert(
                PREDICTION_COLUMN, ("prediction", texts.get(row["index"]) or None)
            )
            rows.append({**dict(cells), "index": int(row["index"])})
        return rows


def _group_item(
    first: base.Question, first_row: base.Item, rotations: Sequence[base.Item]
) -> base.Item:
    """The item of a group, of its first rotation and all of them."""
    return base.item_of(
        first,
        None,
        score=int(all(rotation["correct"] for rotation in rotations)),
        answer=first_row["text"],
        missing=any(rotation["missing"] for rotation in rotations),
        choices=list(choices_of(first.rule).values()),
        l2_category=first.rule.get("l2-category") or "",
        split=first.rule.get("split") or "",
        rows=list(rotations),
    )


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of MMBench's TSV; its images are base64 in a column, larger than csv's default field."""
    csv.field_size_limit(1 << 28)
    rows = list(
        csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    )
    needed = {"index", "question", "A", "B", "answer"}
    columns = [key for key in rows[0] if key] if rows else []
    if not needed <= set(columns):
        raise ValueError(
            f"{path} has the columns {columns}, expected at least {sorted(needed)} (tab-separated)"
        )
    return rows


def choices_of(row: dict[str, str]) -> dict[str, str]:
    """The options of a row by letter."""
    cells = {letter: row.get(letter) for letter in "ABCD"}
    return {
        letter: text
        for letter, text in cells.items()
        if text is not None and text not in PANDAS_MISSING
    }


def letter_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The option by its letter, else by its text; None if neither. 'Z' stands for a refusal: no
    option, so wrong."""
    # through a spreadsheet and back
    answer = "nan" if answer in PANDAS_MISSING else answer
    if API_FAILED in answer:
        return _by_text(answer, options)
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(MARKS_AS_SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    named_after = ANSWER_IS.search(answer)
    if named_after and named_after[1].upper() in options:
        return named_after[1].upper()
    return _by_text(answer, options)


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text the answer, if not much longer than all options, contains in any
    case."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    contained = [
        letter for letter, text in options.items() if text.lower() in answer.lower()
    ]
    return contained[0] if len(contained) == 1 else None


@lru_cache(maxsize=1)  # since a table has every picture
def _encoded_images(table: Path) -> dict[str, str]:
    """Base64 pictures by index."""
    return {row["index"]: row.get("image") or "" for row in read_table(table)}


ENGLISH = (
    "mmbench_dev_2*.tsv",
    "mmbench_dev_en*.tsv",
    "mmbench_test_2*.tsv",
    "mmbench_test_en*.tsv",
)
CHINESE = ("mmbench_dev_cn*.tsv", "mmbench_test_cn*.tsv", "mmbench_cn*.tsv")
MMBENCH = MMBench(
    name="mmbench",
    title="MMBench",
    order=8,
    headline="vlmevalkit_exact_matching.overall",
    scale=100.0,
    folders=("mmbench",),
    annotations=ENGLISH,
    question_files=ENGLISH,
    evaluate_options=("--single-pred-prompt", *base.LONG_ANSWERS),
    submission_format="jsonl",  # its server takes the same rows as .xlsx: docs/mllm.md
    published=base.published_scores(
        llava_7b=64.3, llava_13b=67.7, reproduced_7b=66.66, llm2clip_7b=68.29
    ),
)
MMBENCH_CN = replace(  # the same questions in Chinese
    MMBENCH,
    name="mmbench_cn",
    title="MMBench-CN",
    order=9,
    folders=("mmbench", "mmbench_cn"),  # LLaVA keeps both languages in one folder
    annotations=CHINESE,
    question_files=CHINESE,
    evaluate_options=(*MMBENCH.evaluate_options, "--lang", "cn"),
    published=base.published_scores(
        llava_7b=58.3, llava_13b=63.6, reproduced_7b=60.39, llm2clip_7b=60.40
    ),
)
BENCHMARK = [MMBENCH, MMBENCH_CN]
