"""GQA, testdev_balanced: exact match, and the breakdowns of its ``eval.py``.

Rule: https://cs.stanford.edu/people/dorarad/gqa/evaluate.html on what LLaVA's ``convert_gqa_for_eval.py`` writes: full
stops at the end go, lower case, nothing else ('red .' stays 'red '). Validity and plausibility are 0, as the official
script gives them where the choices file is absent. ``corrected`` strips spaces and ignores case and punctuation.
"""

from __future__ import annotations

import json
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import Answer, Answers, read_json
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
    shown,
    text_of,
)
from llava_integration.benchmarks.match import match
from llm2clip_plugin.contracts import whole_file

NOT_A_STEP = ("exist", "query: name", "choose name")  # operations that ask, rather than reason
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def load(folder: Path) -> list[Question]:
    """The balanced questions, in the file's order."""
    path = need_file(
        folder,
        *BENCHMARK.annotations,
        benchmark_name="gqa",
        where="questions1.2.zip at https://cs.stanford.edu/people/dorarad/gqa/download.html, into data/",
    )
    return [
        Question(
            id=identifier,
            text=entry["question"],
            cluster=str(entry["imageId"]),
            truth=entry["answer"],
            image=f"{entry['imageId']}.jpg",
            category=entry["types"]["structural"],
            extra={
                "semantic": entry["types"]["semantic"],
                "steps": _steps(entry["semantic"]),
                "words": len(entry["question"].split()),
                "group": entry["groups"]["global"],
            },
        )
        for identifier, entry in read_json(path).items()
        if entry.get("isBalanced", True)
    ]


def _steps(program: Sequence[dict]) -> int:
    """Reasoning steps of a question's program: its operations that are not merely the asking."""
    names = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(not any(word in name for word in NOT_A_STEP) for name in names)


def convert(text: str) -> str:
    """What LLaVA's converter hands to the evaluation."""
    return text.rstrip(".").lower()


def loose(text: str) -> str:
    """lmms-eval's normal form: lower case without punctuation."""
    return text.lower().translate(NO_PUNCTUATION)


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Accuracy, its parts, and the distance of the answers' distribution from the truth's."""
    questions = load(folder)
    matched = match(
        questions,
        answers,
        options,
        name="gqa",
    )
    submitted = answers.layout == "submission"
    items = [
        score_one(question, answer, submitted) for question, answer in zip(questions, matched.answers, strict=True)
    ]
    metrics = numbers(items)
    metrics["lmms_eval.exact_match"] = mean([item["score_lmms_eval"] for item in items])
    if options.corrected:
        metrics["corrected_accuracy_percent"] = 100 * mean(
            [float(loose(item["answer"]).strip() == loose(item["truth"]).strip()) for item in items]
        )
    return Scored(metrics=metrics, items=items, counts=matched.counts, notes=matched.notes)


def score_one(question: Question, answer: Answer | None, submitted: bool) -> Item:
    """One question's item; a missing answer is wrong (the official script refuses the file)."""
    text = text_of(answer)
    prediction = text if submitted else convert(text)
    return {
        **shown(question, answer),
        "score": int(answer is not None and prediction == question.truth),
        "prediction": prediction,
        "score_lmms_eval": float(loose(text) == loose(question.truth)),
        "semantic": question.extra["semantic"],
        "steps": question.extra["steps"],
        "words": question.extra["words"],
        "group": question.extra["group"],
    }


def numbers(items: Sequence[Item]) -> dict[str, float]:
    """The official script's numbers: percent, and the counts of each part."""
    query = [item for item in items if item["category"] == "query"]
    binary = [item for item in items if item["category"] != "query"]
    tree: dict[str, Any] = {
        "accuracy_percent": 100 * mean([item["score"] for item in items]),
        "binary_percent": 100 * mean([item["score"] for item in binary]),
        "open_percent": 100 * mean([item["score"] for item in query]),
        "distribution": chi_square(items) / 100,
        "validity": 0.0,
        "plausibility": 0.0,
    }
    for name, part in (
        ("per_structural_type", "category"),
        ("per_semantic_type", "semantic"),
        ("per_steps", "steps"),
        ("per_length", "words"),
    ):
        groups = by_group(items, part)
        tree[name] = {key: 100 * mean(values) for key, values in groups.items()}
        tree[f"{name}_count"] = {key: len(values) for key, values in groups.items()}
    return flatten(tree)


def chi_square(items: Sequence[Item]) -> float:
    """Distance of predicted from true answers within each global group, averaged by the group's size.

    sum over groups of n_g x sum over true answers a of (predicted_a - true_a)^2 / true_a, over sum of n_g.
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if item["group"] is not None:
            true[item["group"]][item["truth"]] += 1
            predicted[item["group"]][item["prediction"]] += 1
    total = weighted = 0.0
    for group, counts in true.items():
        size = sum(counts.values())
        distance = sum((predicted[group][answer] - expected) ** 2 / expected for answer, expected in counts.items())
        weighted += distance * size
        total += size
    return weighted / total if total else 0.0


def statistic(items: Sequence[Item]) -> Statistic:
    """Accuracy, percent."""
    return mean_statistic([item["score"] for item in items])


def submission(folder: Path, answers: Answers, output: Path) -> None:
    """The predictions file of GQA's own ``eval.py``."""
    rows = [{"questionId": answer.id, "prediction": convert(answer.text or "")} for answer in answers.rows]
    with whole_file(output) as aside:
        aside.write_text(json.dumps(rows), encoding="utf-8")


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    headline="accuracy_percent",
    folders=("gqa",),
    questions=("llava_gqa*.jsonl",),
    image_folders=("data/images", "images", ""),
    tasks=("gqa", "gqa_lite"),
    annotations=(
        "data/testdev_balanced_questions.json",
        "testdev_balanced_questions.json",
        "data/questions1.2/testdev_balanced_questions.json",
    ),
    load=load,
    score=score,
    statistic=statistic,
    submission=submission,
)
