"""MMBench dev, circular: a question is right only if every rotation of its options is answered right.

Rules: VLMEvalKit's exact matching on LLaVA's ``convert_mmbench_for_submission.py`` of the answers (the headline), and
lmms-eval's static one (``lmms_eval_static``). Neither uses a judge: what they cannot read is wrong, whereas the MMBench
server has a GPT model read it, so its numbers are a little higher. Quirks kept: the article 'A' alone is option A; an
option text contained in another is ambiguous; texts that pandas reads as missing values ('None', 'NA') are no options,
and as answers they are 'nan'. ``corrected`` is without the pandas quirk.
"""

import base64
import binascii
import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_text
from llava_integration.benchmarks.benchmark import (
    LONG_ANSWERS,
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    by_group,
    flatten,
    item_of,
    mean,
    mean_of,
    published_scores,
)

# The option in a free answer: heuristics of VLMEvalKit's exact matching (at e8e78f0) and lmms-eval's static MMBench
# (at 75571cf). Golden answers in the tests pin both.

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


def letter_vlmevalkit(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that VLMEvalKit's exact matching reads: by letter, else by the option's text; None if neither.

    'Z' stands for a refusal, which is no option and so wrong.
    """
    return _letter_by_word(answer, options) or _letter_by_text(
        answer, options, longest=2 * sum(map(len, options.values()))
    )


def _letter_by_word(answer: str, options: Mapping[str, str]) -> str | None:
    if API_FAILED in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(MARKS_AS_SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    named_after = ANSWER_IS.search(answer)
    return named_after[1].upper() if named_after and named_after[1].upper() in options else None


def _letter_by_text(answer: str, options: Mapping[str, str], longest: int | None = None) -> str | None:
    """The only option whose text the answer contains, in any case."""
    answer = answer.lower()
    if longest is not None and len(answer) > longest:
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None


# the ways of writing a letter that lmms-eval's prefetch knows, after the bare letter
AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def letter_lmms_eval(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that lmms-eval's prefetch reads; E counts as a letter whether there is such an option or not."""
    return _prefetched_letter(answer) or _letter_by_text(answer, options)


def _prefetched_letter(answer: str) -> str | None:
    if API_FAILED in answer:
        return None
    words = answer.split()
    named = [letter for letter in "ABCDE" if letter in words]
    article = "A" in words and len(words) > 3
    if len(named) == 1 and not article:
        return named[0]
    for before, behind in AROUND:
        written = [letter for letter in "ABCDE" if before + letter + behind in words]
        if len(written) == 1:
            return written[0]
    return None


PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def mcq_letter(answer: str, letters: Sequence[str]) -> str:
    """lmms-eval's extraction where its prefetch gives None: the letter with the highest rank, '' without any.

    Ranks: a letter at the start, at the end, behind a phrase like 'the answer is', in parentheses, before '.', ':',
    ')', a space, anywhere; within a rank the last place wins, at one place the earlier letter of the alphabet.
    """
    if not answer.strip():
        return ""
    text = answer.strip()
    for mark in (",", ".", "!", "?", ";", ":", "'", '"'):
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    candidates: list[tuple[int, int, str]] = []  # rank, place, letter
    for rank, (before, behind) in ((6, ("(", ")")), (5, ("", ".")), (4, ("", ":")), (3, ("", ")")), (2, ("", " "))):
        candidates += [(rank, text.rfind(before + x + behind), x) for x in letters if before + x + behind in text]
    low = text.lower()
    for phrase in PHRASES:
        if (start := low.find(phrase)) != -1:
            places = [(text.find(x, start + len(phrase)), x) for x in letters]
            candidates += [(7, place, x) for place, x in places if place != -1]
    candidates += [(10, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    candidates += [(9, len(text) - 1, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    if not candidates:
        candidates = [(0, text.rfind(x), x) for x in letters if x in text]
    return max(candidates, key=lambda entry: entry[:2])[2] if candidates else ""


WHERE = "https://github.com/open-compass/MMBench"
ROTATION = 1_000_000  # index = group + rotation x this
# What pandas reads as a missing value: official scripts load tables and spreadsheets with it.
PANDAS_MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null"}
)  # fmt: skip
SHORT_NAMES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category", "prediction"}
PREDICTION_COLUMN = 6  # where the official converter puts it
_ENCODED_IMAGES: dict[str, dict[str, str]] = {}  # of one table, since it has every picture


class MMBench(Benchmark):
    """Circular accuracy by both rules, by category. Items are groups of rotations, questions single rotations."""

    def load(self, folder: Path) -> list[Question]:
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
                raise ValueError(
                    f"{table} has no answer to index {row['index']}: the test split is scored by the server; "
                    "write --submission FILE"
                )
            pictured = image and with_images
            questions.append(
                Question(
                    id=int(row["index"]),
                    text=row["question"],
                    cluster=hashlib.sha256(image.encode()).hexdigest()[:16] if pictured else f"group {group}",
                    truth=row["answer"],
                    image=str(group),
                    category=row.get("category") or "",
                    extra={"row": row},
                )
            )
        return questions

    def recognizes(self, answer: Answer) -> bool:
        """By the fields of LLaVA's model_vqa_mmbench."""
        return "round_id" in answer.row or "option_char" in answer.row

    def score(self, folder: Path, answers: Answers, options: Options) -> Scored:
        """Scores every rotation, then the groups."""
        questions, matched = self.join(folder, answers, options)
        rows = [self.score_item(*pair) for pair in zip(questions, matched.answers, strict=True)]
        items = group_items(questions, rows)
        rotations = flatten(
            {
                "vanilla.all_rows": mean_of(rows, "correct"),
                "vanilla.index_lt_1e6": mean_of([row for row in rows if row["index"] < ROTATION], "correct"),
            }
        )
        unread = sum(row["inferred"] is None and not row["missing"] for row in rows)
        return Scored(
            metrics={**self.metrics(items), **rotations},
            items=items,
            counts={**matched.counts, "unread": unread},
            notes=matched.notes,
        )

    def score_item(self, question: Question, answer: Answer | None) -> Item:
        """One rotation: the letter that each rule reads."""
        row = question.extra["row"]
        said = answer.text or "" if answer else ""
        text = "nan" if said in PANDAS_MISSING else said  # through a spreadsheet and back
        choices = choices_of(row)
        letter = letter_vlmevalkit(text, choices)
        prefetched = letter_lmms_eval(said.strip(), choices)
        corrected = letter_vlmevalkit(said, choices_of(row, missing=frozenset({""})))
        return {
            "index": question.id,
            "inferred": letter,
            "answer": question.truth,
            "correct": int(letter == question.truth),
            "prefetched_lmms_eval": prefetched,
            "correct_lmms_eval": int((prefetched or mcq_letter(said.strip(), sorted(choices))) == question.truth),
            "correct_corrected": int(answer is not None and corrected == question.truth),
            "text": said,
            "missing": answer is None,
        }

    def metrics(self, items: Sequence[Item]) -> dict[str, float]:
        """Circular accuracy by both rules."""

        def means(group: str, field: str) -> dict[str, float]:
            return {key: mean(values) for key, values in by_group(items, group, field).items() if key}

        abilities = means("l2_category", "hit_vlmevalkit")
        return flatten(
            {
                "vlmevalkit_exact_matching": {
                    "overall": mean_of(items),
                    "by_l2_and_category": {
                        **{SHORT_NAMES.get(key, key): value for key, value in abilities.items()},
                        **means("category", "hit_vlmevalkit"),
                    },
                    "n_groups": len(items),
                    "hits": sum(item["score"] for item in items),
                },
                "lmms_eval_static": {
                    "overall": mean_of(items, "hit_lmms_static"),
                    "category": means("category", "hit_lmms_static"),
                    "l2_category": means("l2_category", "hit_lmms_static"),
                },
                "corrected_overall": mean_of(items, "hit_corrected"),
            }
        )

    def image_bytes(self, folder: Path, item: Item) -> bytes | None:
        """The picture of a group, from the table's base64 column."""
        for pattern in self.question_files:
            for table in sorted(folder.glob(pattern)):
                if encoded := _encoded_images(table).get(str(item["image"])):
                    try:
                        return base64.b64decode(encoded, validate=True)
                    except binascii.Error:
                        return None
        return None

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """The rows of the official converter's table."""
        texts = {str(answer.id): answer.text for answer in answers.rows}
        rows = []
        for row in read_table(self.require(folder, *self.question_files, where=WHERE)):
            cells = [(key, value if value != "" else None) for key, value in row.items() if key not in NOT_SUBMITTED]
            cells.insert(PREDICTION_COLUMN, ("prediction", texts.get(row["index"]) or None))
            rows.append({**dict(cells), "index": int(row["index"])})
        return rows


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of MMBench's TSV; its images are base64 in a column, larger than csv's default field."""
    csv.field_size_limit(1 << 28)
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    needed = {"index", "question", "A", "B", "answer"}
    if not rows or not needed <= set(rows[0]):
        columns = sorted(key for key in rows[0] if key) if rows else []
        raise ValueError(
            f"{path} is missing the columns {sorted(needed - set(columns))}; it has {columns} (tab-separated)"
        )
    return rows


def choices_of(row: dict[str, str], *, missing: frozenset[str] = PANDAS_MISSING) -> dict[str, str]:
    """The options of a row by letter."""
    return {letter: row[letter] for letter in "ABCD" if row.get(letter) is not None and row[letter] not in missing}


def group_items(questions: Sequence[Question], rows: Sequence[Item]) -> list[Item]:
    """One item for each group of rotations whose first rotation is in the table; the official rule ignores others."""
    groups: dict[int, list[tuple[Question, Item]]] = {}
    for question, row in zip(questions, rows, strict=True):
        groups.setdefault(int(question.id) % ROTATION, []).append((question, row))
    items = []
    for group, members in groups.items():
        first = next((pair for pair in members if pair[0].id == group), None)
        if first is None:
            continue
        question, row = first
        table_row, rotations = question.extra["row"], [member for _, member in members]
        hits = {
            name: int(all(rotation[field] for rotation in rotations))
            for name, field in (
                ("hit_vlmevalkit", "correct"),
                ("hit_lmms_static", "correct_lmms_eval"),
                ("hit_corrected", "correct_corrected"),
            )
        }
        items.append(
            item_of(
                question,
                None,
                score=hits["hit_vlmevalkit"],
                g_index=group,
                **hits,
                answer=row["text"],
                missing=any(rotation["missing"] for rotation in rotations),
                choices=list(choices_of(table_row).values()),
                l2_category=table_row.get("l2-category") or "",
                split=table_row.get("split") or "",
                rows=rotations,
            )
        )
    return items


def _encoded_images(table: Path) -> dict[str, str]:
    """Base64 pictures by index; of one table at a time."""
    key = str(table.resolve())
    if key not in _ENCODED_IMAGES:
        _ENCODED_IMAGES.clear()
        _ENCODED_IMAGES[key] = {row["index"]: row.get("image") or "" for row in read_table(table)}
    return _ENCODED_IMAGES[key]


PATTERNS = ("mmbench_dev_2*.tsv", "mmbench_dev_en*.tsv", "mmbench_test_2*.tsv", "mmbench_test_en*.tsv")
BENCHMARK = MMBench(
    name="mmbench",
    title="MMBench",
    order=8,
    headline="vlmevalkit_exact_matching.overall",
    scale=100.0,
    folders=("mmbench",),
    annotations=PATTERNS,
    question_files=PATTERNS,
    evaluate_options=("--single-pred-prompt", *LONG_ANSWERS),
    lmms_eval_tasks=("mmbench_en_dev", "mmbench_en_dev_static", "mmbench_en_dev_lite", "mmbench_en"),
    logged_id=("index", "gpt_eval_score", "submission", "doc"),
    submission_format="jsonl",  # its server takes the same rows as .xlsx: docs/mllm.md
    published=published_scores(llava_7b=64.3, llava_13b=67.7, reproduced_7b=66.66, llm2clip_7b=68.29),
)
