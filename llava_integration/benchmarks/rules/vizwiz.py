"""VizWiz-VQA: ten answers of a crowd a picture, often 'unanswerable'; val is scored here, test by the server.

Two rules, both kept: lmms-eval's (M4C normal form on both sides, the headline) and the VQA API's on what LLaVA's
``convert_vizwiz_for_submission.py`` makes of the answers (``vqa_api``; the challenge's code is a fork of that API).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_json, read_jsonl
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
from llava_integration.benchmarks.vqa_text import corrected_accuracy, m4c, m4c_accuracy, vqa_api_accuracy
from llm2clip_plugin.contracts import whole_file


def load(folder: Path) -> list[Question]:
    """Questions of val.json; their ids are those of LLaVA's question file of val, else their places in val.json."""
    annotations = need_file(
        folder,
        "val.json",
        "*val*.json",
        benchmark_name="vizwiz",
        where="val.json is in Annotations.zip at https://vizwiz.org/tasks-and-datasets/vqa; the answers of the test "
        "split are with the server alone: use --submission FILE",
    )
    entries = read_json(annotations)
    path = optional_file(folder, "llava_val*.jsonl")
    asked = {row["image"]: row["question_id"] for row in read_jsonl(path)} if path else {}
    if path and (unknown := [entry["image"] for entry in entries if entry["image"] not in asked]):
        raise ValueError(f"{len(unknown)} images of {annotations} ({unknown[0]} ...) are not in {path}: another split?")
    return [
        Question(
            id=asked.get(entry["image"], place),
            text=entry["question"],
            cluster=entry["image"],
            truth=[answer["answer"] for answer in entry["answers"]],
            image=entry["image"],
            category=entry.get("answer_type", ""),
        )
        for place, entry in enumerate(entries)
    ]


def logged_key(row: Row) -> str | None:
    """The image's name in an lmms-eval row."""
    entry = row.get("submission")
    return Path(str(entry["image"])).stem if isinstance(entry, dict) and "image" in entry else None


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Accuracy by lmms-eval's rule and by the VQA API's on LLaVA's submission."""
    questions = load(folder)
    matched = match(
        questions,
        answers,
        options,
        name="vizwiz",
        question_key=lambda question: str(question.id) if answers.layout == "llava" else Path(question.image).stem,
        answer_key=lambda answer: str(answer.id) if answers.layout == "llava" else Path(str(answer.id)).stem,
        logged_key=logged_key,
    )
    items = [score_one(question, answer) for question, answer in zip(questions, matched.answers, strict=True)]
    types = by_group(items, "category", "score_vqa_api")
    metrics = flatten(
        {
            "lmms_eval_accuracy": mean([item["score"] for item in items]),
            "vqa_api": {
                "overall": round(100 * mean([item["score_vqa_api"] for item in items]), 2),
                "per_answer_type": {key: round(100 * mean(values), 2) for key, values in types.items()},
            },
        }
    )
    if options.corrected:
        metrics["corrected_overall"] = 100 * mean(
            [corrected_accuracy(item["answer"], item["truth"]) for item in items if not item["missing"]]
        )
    return Scored(metrics=metrics, items=items, counts=matched.counts, notes=matched.notes)


def score_one(question: Question, answer: Answer | None) -> Item:
    """One question's item; a missing answer scores 0."""
    text = text_of(answer)
    submitted = m4c(text)
    api = vqa_api_accuracy(submitted, question.truth) if answer else 0.0
    return {
        **shown(question, answer),
        "score": m4c_accuracy(text, question.truth) if answer else 0.0,
        "submission": submitted,
        "score_vqa_api": api,
        "score_vqa_api_percent": round(100 * api, 2),
    }


def statistic(items: Sequence[Item]) -> Statistic:
    """Mean accuracy, percent."""
    return mean_statistic([item["score"] for item in items])


def submission(folder: Path, answers: Answers, output: Path) -> None:
    """The file for the server; its converter wants an answer to every question."""
    texts = {str(answer.id): answer.text for answer in answers.rows if answer.text is not None}
    where = "LLaVA's questions, in its eval.zip: question_id, image, text"
    rows = read_jsonl(need_file(folder, *BENCHMARK.questions, benchmark_name="vizwiz", where=where))
    if missing := [row["question_id"] for row in rows if str(row["question_id"]) not in texts]:
        raise ValueError(
            f"{len(missing)} questions have no answer in {answers.path}, first {missing[0]}; the server wants all"
        )
    with whole_file(output) as aside:
        entries = [{"image": row["image"], "answer": m4c(texts[str(row["question_id"])])} for row in rows]
        aside.write_text(json.dumps(entries), encoding="utf-8")


BENCHMARK = Benchmark(
    name="vizwiz",
    title="VizWiz",
    headline="lmms_eval_accuracy",
    scale=100.0,
    folders=("vizwiz",),
    questions=("llava_val*.jsonl", "llava_test*.jsonl"),
    image_folders=("val", "test", "images", ""),
    tasks=("vizwiz_vqa_val", "vizwiz_vqa_val_lite"),
    annotations=("val.json",),
    load=load,
    score=score,
    statistic=statistic,
    submission=submission,
)
