"""ScienceQA: multiple choice, of which the questions with an image (IMG) are the headline.

Rule of LLaVA's ``eval_science_qa.py``: the answer is exactly a letter A-E, or begins 'X. ', or holds exactly one
'The answer is X' followed by any character. Its IMG share counts questions whose *prompt* has ``<image>``, so a missing
answer leaves the IMG denominator; ``corrected`` counts every question of the split that has an image, and takes 'A.',
'(A)', 'a' and 'The answer is A' at the end for answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, read_json
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
from llava_integration.benchmarks.match import Matched, match

LETTERS = ("A", "B", "C", "D", "E")
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
LOOSE = re.compile(r"\s*\(?([A-Ea-e])\)?[.):,]?(?:\s.*)?|.*\b[Aa]nswer is:?\s*\(?([A-E])\)?\b.*", re.DOTALL)


def load(folder: Path) -> list[Question]:
    """The questions of the test split, in its order."""
    where = "from https://github.com/lupantech/ScienceQA (data/scienceqa)"
    problems = read_json(need_file(folder, "problems.json", benchmark_name="scienceqa", where=where))
    split = read_json(need_file(folder, "pid_splits.json", benchmark_name="scienceqa", where=where))
    return [
        Question(
            id=identifier,
            text=problems[identifier]["question"],
            cluster=identifier,  # a picture belongs to one question
            truth=LETTERS[problems[identifier]["answer"]],
            image=f"{identifier}/{problems[identifier]['image']}" if problems[identifier]["image"] else "",
            category=problems[identifier]["subject"],
            extra={"choices": problems[identifier]["choices"]},
        )
        for identifier in split["test"]
    ]


def parse(text: str) -> str:
    """The letter that the official script reads, or FAILED."""
    if text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else "FAILED"


def parse_corrected(text: str) -> str:
    """The letter that a reader would take: the official rule, and what it should have allowed."""
    if (letter := parse(text)) != "FAILED":
        return letter
    found = LOOSE.fullmatch(text)
    return (found[1] or found[2]).upper() if found else "FAILED"


def parse_lmms_eval(text: str, truth: str) -> float:
    """lmms-eval's score: the letter in either case, or a capital followed by a full stop."""
    text = text.strip()
    if text.lower() == truth.lower():
        return 1.0
    return float(len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0] == truth)


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Accuracy over all questions and over those with an image."""
    questions = load(folder)
    logged = answers.layout == "lmms_eval"
    if logged:  # lmms-eval's scienceqa_img holds the questions with an image alone
        pictured = [question for question in questions if question.image]
        if len(answers.rows) <= len(pictured):
            questions = pictured
    matched = match(
        questions,
        answers,
        options,
        name="scienceqa",
    )
    items = [score_one(question, answer, logged) for question, answer in zip(questions, matched.answers, strict=True)]
    if not any(item["is_multimodal"] for item in items):
        raise ValueError(
            f"no prompt in {answers.path} has <image>: the questions were asked without their images, and "
            "ScienceQA-IMG is about those; evaluate with LLaVA's question file and --image-folder"
        )
    return Scored(
        metrics=numbers(items, options, logged), items=items, counts=_counts(matched, items), notes=matched.notes
    )


def _counts(matched: Matched, items: Sequence[Item]) -> dict[str, int]:
    unread = sum(item["parsed"] == "FAILED" and not item["missing"] for item in items)
    return {**matched.counts, "no_letter": unread}


def score_one(question: Question, answer: Answer | None, logged: bool) -> Item:
    """One question's item."""
    text = answer.text or "" if answer else "FAILED"
    letter = parse(text)
    choices = question.extra["choices"]
    index = LETTERS.index(letter) if letter in LETTERS[: len(choices)] else -1
    return {
        **shown(question, answer),
        "score": int(index == LETTERS.index(question.truth)),
        "parsed": letter,
        "pred_idx": index,
        "is_multimodal": bool(question.image) if logged else bool(answer and "<image>" in answer.prompt),
        "has_image": bool(question.image),
        "score_corrected": int(answer is not None and parse_corrected(text) == question.truth),
        "score_lmms_eval": parse_lmms_eval(text, question.truth) if answer else 0.0,
        "ground_truth": question.truth,
        "choices": choices,
    }


def numbers(items: Sequence[Item], options: Options, logged: bool) -> dict[str, float]:
    """The official script's numbers."""
    pictured = [item for item in items if item["is_multimodal"]]
    metrics = {
        "total": float(len(items)),
        "correct": float(sum(item["score"] for item in items)),
        "accuracy_percent": 100 * mean([item["score"] for item in items]),
        "img_total": float(len(pictured)),
        "img_correct": float(sum(item["score"] for item in pictured)),
        "img_accuracy_percent": 100 * mean([item["score"] for item in pictured]),
        "img_accuracy_printed": round(100 * mean([item["score"] for item in pictured]), 2),
        "problems_with_image_in_split": float(sum(item["has_image"] for item in items)),
        "lmms_eval.exact_match": mean([item["score_lmms_eval"] for item in items if item["has_image"]]),
    }
    if logged:
        del metrics["total"], metrics["correct"], metrics["accuracy_percent"]
    if options.corrected:
        corrected = [item["score_corrected"] for item in items]
        metrics["corrected_accuracy_percent"] = 100 * mean(corrected)
        metrics["corrected_img_accuracy_percent"] = 100 * mean(
            [value for value, item in zip(corrected, items, strict=True) if item["has_image"]]
        )
    return metrics


def statistic(items: Sequence[Item]) -> Statistic:
    """IMG accuracy, percent; over all questions where none has an image."""
    pictured = [bool(item.get("is_multimodal", True)) for item in items]
    return mean_statistic([item["score"] for item in items], pictured if any(pictured) else None)


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA-IMG",
    headline="img_accuracy_percent",
    folders=("scienceqa",),
    questions=("llava_test_CQM-A.json", "llava_test_*.json"),
    image_folders=("images/test", "images", "test", ""),
    tasks=("scienceqa_img", "scienceqa"),
    annotations=("problems.json", "pid_splits.json"),
    load=load,
    score=score,
    statistic=statistic,
)
