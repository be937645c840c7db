"""MM-Vet: open questions, each needing some of six capabilities, marked 0 to 1 by a judge, usually five times.

The judge is a GPT model that this package does not ask: ``--reviews`` is the grade file that MM-Vet's evaluator wrote
(``{"v1_0": {"score": [0.5, ...], ...}}``, one mark a run). Score: 100 x mean over runs of the mean mark, in all and for
the questions of each capability; the spread over runs is beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers, read_answers, read_json
from llava_integration.benchmarks.base import (
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    mean,
    mean_statistic,
    need_file,
    shown,
)
from llava_integration.benchmarks.match import match


def load(folder: Path) -> list[Question]:
    """The questions with their capabilities."""
    path = need_file(
        folder, "mm-vet.json", benchmark_name="mmvet", where="from https://github.com/yuweihao/MM-Vet (mm-vet.zip)"
    )
    return [
        Question(
            id=identifier,
            text=entry["question"],
            cluster=entry["imagename"],
            truth=entry["answer"],
            image=entry["imagename"],
            category="+".join(sorted(entry["capability"])),
            extra={"capabilities": entry["capability"]},
        )
        for identifier, entry in read_json(path).items()
    ]


def _name(identifier: object) -> str:
    """LLaVA's question ids are numbers, MM-Vet's are v1_<number>."""
    return str(identifier) if str(identifier).startswith("v1_") else f"v1_{identifier}"


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Mean mark in all and by capability, from the judge's grades."""
    grades = answers if answers.layout == "judge" else _grades(answers, options)
    questions = load(folder)
    graded = Answers(**{**vars(grades), "rows": tuple(_with_text(row) for row in grades.rows)})
    matched = match(
        questions,
        graded,
        options,
        name="mmvet",
        question_key=lambda question: _name(question.id),
        answer_key=lambda answer: _name(answer.id),
    )
    texts = {} if answers is grades else {_name(answer.id): answer.text or "" for answer in answers.rows}
    items = [score_one(question, grade, texts) for question, grade in zip(questions, matched.answers, strict=True)]
    metrics = numbers([item for item in items if not item["missing"]])
    if options.corrected:
        metrics["corrected_total"] = 100 * mean([item["score"] for item in items])
    return Scored(metrics=metrics, items=items, counts=matched.counts, notes=matched.notes)


def _with_text(row: Answer) -> Answer:
    """A grade counts as an answer that is there."""
    return Answer(**{**vars(row), "text": ""})


def _grades(answers: Answers, options: Options) -> Answers:
    if options.reviews is None:
        raise ValueError(
            f"MM-Vet needs a judge: {answers.path} holds answers, not grades. Give it to MM-Vet's evaluator (LLaVA's "
            "convert_mmvet_for_eval.py makes its input) and pass the *-grade-*.json that it writes as --reviews (or as "
            "--answers); grades are never made up here"
        )
    grades = read_answers(options.reviews)
    if grades.layout != "judge":
        raise ValueError(f'{options.reviews} holds no grades: expected {{"v1_0": {{"score": [...]}}}}')
    return grades


def score_one(question: Question, grade: Answer | None, texts: dict[str, str]) -> Item:
    """One question's item: its mean mark over the judge's runs."""
    runs = [float(mark) for mark in grade.row["score"]] if grade else []
    if grade and not runs:
        raise ValueError(f"{question.id} has no grades in the judge's file; let the evaluator finish")
    return {
        **shown(question, grade),
        "score": mean(runs),
        "runs": runs,
        "capabilities": list(question.extra["capabilities"]),
        "answer": texts.get(_name(question.id), ""),
    }


def numbers(items: Sequence[Item]) -> dict[str, float]:
    """Total, capabilities, and the total's spread over the judge's runs, percent."""
    metrics = {"total": 100 * mean([item["score"] for item in items])}
    for name in sorted({name for item in items for name in item["capabilities"]}):
        metrics[f"capability.{name}"] = 100 * mean([item["score"] for item in items if name in item["capabilities"]])
    runs = min((len(item["runs"]) for item in items), default=0)
    totals = [100 * mean([item["runs"][run] for item in items]) for run in range(runs)]
    metrics["runs"] = float(runs)
    if runs > 1:
        metrics["std_over_runs"] = float(np.std(totals, ddof=1))
    return metrics


def statistic(items: Sequence[Item]) -> Statistic:
    """Mean mark of the graded questions, percent."""
    return mean_statistic([item["score"] for item in items], [not item.get("missing") for item in items])


BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    headline="total",
    folders=("mm-vet", "mmvet"),
    questions=("llava-mm-vet.jsonl",),
    image_folders=("images", ""),
    tasks=("mmvet",),
    annotations=("mm-vet.json",),
    load=load,
    score=score,
    statistic=statistic,
    needs="a judge",
)
