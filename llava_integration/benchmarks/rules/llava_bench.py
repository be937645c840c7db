"""LLaVA-Bench (in the wild): a judge gives two marks of 1-10 to the reference's and the model's answer.

The judge is a GPT model that this package does not ask: ``--reviews`` is the file that LLaVA's
``eval_gpt_review_bench.py`` wrote, one JSON line a question with ``tuple: [reference, model]``. Score of
``summarize_gpt_review.py``: 100 x mean(model) / mean(reference), means rounded to 3 places, the score to 1. A review
that failed to parse is [-1, -1] and averaged in by the official script; ``corrected`` leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers, read_answers, read_jsonl
from llava_integration.benchmarks.base import (
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    need_file,
    ratio,
    shown,
    text_of,
)
from llava_integration.benchmarks.match import match


def load(folder: Path) -> list[Question]:
    """The questions, in the file's order."""
    path = need_file(
        folder,
        "questions.jsonl",
        benchmark_name="llava_bench",
        where="from https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    )
    return [
        Question(
            id=row["question_id"],
            text=row["text"],
            cluster=row["image"],
            truth="",
            image=row["image"],
            category=row.get("category", ""),
        )
        for row in read_jsonl(path)
    ]


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Relative score overall and by category, from the judge's marks."""
    reviews = answers if answers.layout == "judge" else _reviews(answers, options)
    questions = load(folder)
    matched = match(
        questions,
        reviews,
        options,
        name="llava_bench",
    )
    texts = {} if answers is reviews else {str(answer.id): answer.text or "" for answer in answers.rows}
    items = [score_one(question, review, texts) for question, review in zip(questions, matched.answers, strict=True)]
    failed = sum(item["failed"] for item in items)
    counts = {**matched.counts, "failed_reviews": failed}
    notes = list(matched.notes)
    if failed:
        notes.append(f"{failed} reviews gave no marks; the official script averages them in as -1")
    metrics = numbers([item for item in items if not item["missing"]])
    if options.corrected:
        kept = [item for item in items if not item["missing"] and not item["failed"]]
        metrics.update({f"corrected_{key}": value for key, value in numbers(kept).items()})
    return Scored(metrics=metrics, items=items, counts=counts, notes=notes)


def _reviews(answers: Answers, options: Options) -> Answers:
    if options.reviews is None:
        raise ValueError(
            f"LLaVA-Bench needs a judge: {answers.path} holds answers, not marks. Run LLaVA's "
            "eval_gpt_review_bench.py on it and pass the file that it writes as --reviews (or as --answers); "
            "marks are never made up here"
        )
    reviews = read_answers(options.reviews)
    if reviews.layout != "judge":
        raise ValueError(
            f"{options.reviews} holds no marks: expected lines with question_id and tuple, as LLaVA's "
            "eval_gpt_review_bench.py writes"
        )
    return reviews


def _marks(review: Answer | None) -> tuple[float, float]:
    if review is None:
        return 0.0, 0.0
    marks = review.row.get("tuple")
    if not isinstance(marks, list) or len(marks) != 2:
        raise ValueError(f"line {review.line} of the reviews has tuple {marks!r}, expected [reference, model]")
    return float(marks[0]), float(marks[1])


def score_one(question: Question, review: Answer | None, texts: dict[str, str]) -> Item:
    """One question's item: the model's mark out of 10 as its score."""
    reference, model = _marks(review)
    category = str(review.row.get("category", question.category)) if review else question.category
    return {
        **shown(question, review),
        "score": model / 10,
        "mark_reference": reference,
        "mark_model": model,
        "failed": review is not None and (reference < 0 or model < 0),
        "answer": texts.get(str(question.id), ""),
        "review": text_of(review),
        "category": category,
    }


def numbers(items: Sequence[Item]) -> dict[str, float]:
    """``<category>``: relative score; ``.reference`` and ``.model``: mean marks x 10, all as printed."""
    metrics = {}
    for name in ("all", *sorted({item["category"] for item in items})):
        chosen = [item for item in items if name in ("all", item["category"])]
        reference = round(float(np.mean([item["mark_reference"] for item in chosen])), 3) if chosen else 0.0
        model = round(float(np.mean([item["mark_model"] for item in chosen])), 3) if chosen else 0.0
        metrics[name] = round(model / reference * 100, 1) if reference else 0.0
        metrics[f"{name}.reference"] = round(reference * 10, 1)
        metrics[f"{name}.model"] = round(model * 10, 1)
    return metrics


def statistic(items: Sequence[Item]) -> Statistic:
    """100 x sum of the model's marks / sum of the reference's."""
    sums = np.array([[item["mark_model"], item["mark_reference"]] for item in items], dtype=float)
    return Statistic(sums, lambda totals: 100 * ratio(totals[..., 0], totals[..., 1]))


BENCHMARK = Benchmark(
    name="llava_bench",
    title="LLaVA-Bench",
    headline="all",
    unit="relative %",
    folders=("llava-bench-in-the-wild", "llava_bench"),
    questions=("questions.jsonl",),
    image_folders=("images", ""),
    item_fields=("mark_model", "mark_reference"),
    tasks=("llava_in_the_wild",),
    annotations=("questions.jsonl",),
    load=load,
    score=score,
    statistic=statistic,
    needs="a judge",
)
