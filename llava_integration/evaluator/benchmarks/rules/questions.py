"""Own questions: a JSONL with ``image`` (relative to the file), ``question`` and ``answer``, a text
or a list of texts.

DATA is the file itself, or a folder with a questions.jsonl.

An answer is right if one of the true ones occurs in it as whole words, in the VQA evaluation's
normal form (case, punctuation, articles and number words don't matter), so "a red circle" is right
for "circle"; yes and no must be its first word. ``id`` and ``category`` are optional.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import Answer, Row, read_jsonl
from llava_integration.evaluator.benchmarks.rules.vqa import m4c
from llm2clip_plugin.errors import ContractError


def conversion(path: Path) -> str:
    """The command that makes JSON Lines of a list or a table; "" for other files."""
    ending = path.suffix.lower()
    if ending == ".json":
        return f"jq -c '.[]' {shlex.quote(str(path))} > NEW.jsonl"
    if ending == ".csv":
        name = json.dumps(str(path), ensure_ascii=False)
        # -sig: Excel's "CSV UTF-8" begins with a byte order mark
        rows = f'csv.DictReader(open({name}, encoding="utf-8-sig", newline=""))'
        code = f'import csv, json; print(*map(json.dumps, {rows}), sep="\\n")'
        return f"python -c {shlex.quote(code)} > NEW.jsonl"
    return ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file. Raises ContractError, for a list or a table with the command that
    converts it."""
    try:
        return read_jsonl(path)
    except ContractError as error:
        convert = conversion(path)
        if not convert:
            raise
        raise ContractError(
            f"{path} is not JSON Lines, an object with image, question and answer on each line: "
            f"`{convert}`"
        ) from error


class Questions(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        """The questions, in the file's order. Raises ContractError for a row without one of the
        three fields."""
        where = "each line needs image, question and answer"
        path = folder
        if not folder.is_file():
            path = self.require(folder, *self.annotations, where=where)
        questions: list[base.Question] = []
        for number, row in enumerate(read_rows(path), 1):
            answer = row.get("answer")
            truths = answer if isinstance(answer, list) else [answer]
            texts = [row.get("image"), row.get("question"), *truths]
            if not truths or not all(
                isinstance(text, str) and text.strip() for text in texts
            ):
                expected = "texts in image, question and answer"
                raise ContractError(
                    f"{path}, question {number}: expected {expected}, got {row}"
                )
            questions.append(
                base.Question(
                    id=row.get("id", number),
                    text=row["question"],
                    truth=truths,
                    image=row["image"],
                    category=str(row.get("category", "")),
                )
            )
        if len({str(question.id) for question in questions}) < len(questions):
            raise ContractError(
                f"{path} has an id twice; give each question its own, or none"
            )
        return questions

    def question_rows(self, folder: Path) -> list[Row]:
        return [
            base.question_row(
                question.id, question.image, f"{question.text}\n{base.SHORT_ANSWER}"
            )
            for question in self.load(folder)
        ]

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        text = base.text_of(answer)
        return base.item_of(
            question,
            answer,
            score=int(any(is_right(text, truth) for truth in question.truth)),
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        parts = base.percents([item for item in items if item["category"]], "category")
        return base.flatten(
            {"accuracy_percent": 100 * base.mean_of(items), "categories": parts}
        )


def is_right(answer: str, truth: str) -> bool:
    """Whether the answer contains the truth.

    >>> is_right("A red circle.", "circle"), is_right("circles", "circle")
    (True, False)
    >>> is_right("I see no cat", "no")
    False
    """
    answer = m4c(answer)
    truth = m4c(truth)
    if truth in ("yes", "no"):
        return answer.split()[:1] == [truth]
    return f" {truth} " in f" {answer} "


BENCHMARK = Questions(
    name="questions",
    title="own questions",
    folders=("questions",),
    annotations=("questions.jsonl",),
    question_files=(),
    scored_question_files=("llava_questions.jsonl",),
)
