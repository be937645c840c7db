"""VQAv2: ten human answers a question; on test-dev only the server has them.

Rule: https://visualqa.org/evaluation.html, on what LLaVA's ``convert_vqav2_for_submission.py`` makes of the answers
(``converted_submission``, the headline: it is what LLaVA's published numbers went through) and on the raw texts
(``raw_text``). The converter splits ``'s`` off as a word, which no human answer has, so possessives score 0 through it;
unanimous humans are compared unnormalised. ``corrected`` normalises both sides the same way, always.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, read_json, read_jsonl
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
    optional_file,
    shown,
    text_of,
)
from llava_integration.benchmarks.match import match
from llava_integration.benchmarks.vqa_text import corrected_accuracy, m4c, vqa_api_accuracy
from llm2clip_plugin.contracts import whole_file


def load(folder: Path) -> list[Question]:
    """Questions with their human answers, in the question file's order.

    Raises FileNotFoundError where the annotations are not public (test2015) or not there.
    """
    annotations = need_file(
        folder,
        "*val2014_annotations*.json",
        "*annotations*.json",
        benchmark_name="vqav2",
        where="val2014's are at https://visualqa.org/download.html; for test-dev use --submission FILE and the server "
        "https://eval.ai/web/challenges/challenge-page/830",
    )
    asked = need_file(
        folder,
        "*OpenEnded*val2014_questions*.json",
        "*OpenEnded*questions*.json",
        benchmark_name="vqav2",
        where="https://visualqa.org/download.html",
    )
    truths = {entry["question_id"]: entry for entry in read_json(annotations)["annotations"]}
    images = question_images(folder)
    questions = []
    for entry in read_json(asked)["questions"]:
        truth = truths.get(entry["question_id"])
        if truth is None:
            raise ValueError(
                f"{annotations} has no answers to question {entry['question_id']} of {asked}: another split?"
            )
        questions.append(
            Question(
                id=entry["question_id"],
                text=entry["question"],
                cluster=str(entry["image_id"]),
                truth=[answer["answer"] for answer in truth["answers"]],
                image=images.get(str(entry["question_id"]), f"COCO_val2014_{entry['image_id']:012d}.jpg"),
                category=truth["answer_type"],
                extra={"question_type": truth["question_type"]},
            )
        )
    return questions


def question_images(folder: Path) -> dict[str, str]:
    """Image files by question id, from LLaVA's question file if it is there."""
    path = optional_file(folder, *BENCHMARK.questions)
    return {str(row["question_id"]): str(row.get("image", "")) for row in read_jsonl(path)} if path else {}


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Accuracy of the VQA API on LLaVA's converted answers and on the raw texts."""
    questions = load(folder)
    matched = match(
        questions,
        answers,
        options,
        name="vqav2",
    )
    submitted = answers.layout == "submission"  # went through the converter already
    items = [
        score_one(question, answer, submitted=submitted, corrected=options.corrected)
        for question, answer in zip(questions, matched.answers, strict=True)
    ]
    metrics = flatten(
        {"converted_submission": api_numbers(items, "score"), "raw_text": api_numbers(items, "score_raw")}
    )
    metrics["lmms_eval.exact_match"] = mean([item["score_corrected"] for item in items])
    if options.corrected:
        metrics["corrected_overall"] = 100 * metrics["lmms_eval.exact_match"]
    return Scored(metrics=metrics, items=items, counts=matched.counts, notes=matched.notes)


def score_one(question: Question, answer: Answer | None, *, submitted: bool, corrected: bool) -> Item:
    """One question's item; a missing answer is submitted as '' by the converter."""
    text = text_of(answer)
    submission = text if submitted else m4c(text)
    converted, raw = vqa_api_accuracy(submission, question.truth), vqa_api_accuracy(text, question.truth)
    return {
        **shown(question, answer),
        "score": converted,
        "submission": submission,
        "score_raw": raw,
        "score_corrected": corrected_accuracy(text, question.truth),
        "score_converted_percent": round(100 * converted, 2),
        "score_raw_percent": round(100 * raw, 2),
        "question_type": question.extra["question_type"],
    }


def api_numbers(items: Sequence[Item], field: str) -> dict:
    """The VQA API's numbers: percent, rounded to 2 places as it does, and the overall number unrounded."""
    return {
        "overall": round(100 * mean([item[field] for item in items]), 2),
        "overall_unrounded": 100 * mean([item[field] for item in items]),
        "per_answer_type": {key: round(100 * mean(v), 2) for key, v in by_group(items, "category", field).items()},
        "per_question_type": {
            key: round(100 * mean(v), 2) for key, v in by_group(items, "question_type", field).items()
        },
    }


def statistic(items: Sequence[Item]) -> Statistic:
    """Mean accuracy, percent."""
    return mean_statistic([item["score"] for item in items])


def submission(folder: Path, answers: Answers, output: Path) -> None:
    """The file for the server: one normalised answer for every question of LLaVA's question file, '' where missing."""
    asked = need_file(folder, *BENCHMARK.questions, benchmark_name="vqav2", where="it is in LLaVA's eval.zip")
    texts = {str(answer.id): answer.text for answer in answers.rows}
    rows = [
        {"question_id": row["question_id"], "answer": m4c(texts.get(str(row["question_id"])) or "")}
        for row in read_jsonl(asked)
    ]
    with whole_file(output) as aside:
        aside.write_text(json.dumps(rows), encoding="utf-8")


BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    headline="converted_submission.overall_unrounded",
    folders=("vqav2",),
    questions=("llava_vqav2*.jsonl",),
    image_folders=("val2014", "test2015", "images", ""),
    tasks=("vqav2_val", "vqav2_val_lite", "vqav2"),
    annotations=("*annotations*.json", "*OpenEnded*questions*.json"),
    load=load,
    score=score,
    statistic=statistic,
    submission=submission,
)
