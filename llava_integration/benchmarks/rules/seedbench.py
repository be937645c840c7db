"""SEED-Bench: four options, image and video questions by type; the letter and nothing else is right.

Rule of LLaVA's ``convert_seed_for_submission.py``: ``text == answer`` exactly ('A.', 'a' and 'A. cat' are wrong). The
headline is the accuracy over all questions, as in LLaVA's table; image and video are beside it. An unanswered question
is wrong. ``corrected`` reads the letter at the start of the answer in either case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_json
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

LETTER = re.compile(r"\s*\(?([A-Da-d])\)?(?:[.):,]|\s|$)|.*\b[Aa]nswer is:?\s*\(?([A-D])\b", re.DOTALL)


def load(folder: Path) -> list[Question]:
    """All questions, in the file's order."""
    data = read_json(_file(folder))
    names = {number: name for name, number in data["question_type"].items()}
    return [
        Question(
            id=entry["question_id"],
            text=entry["question"],
            cluster=_media(entry),
            truth=entry["answer"],
            image=f"SEED-Bench-{entry['data_type']}/{_media(entry)}" if entry["data_type"] == "image" else "",
            category=names[entry["question_type_id"]],
            extra={
                "type": entry["question_type_id"],
                "media": entry["data_type"],
                "choices": [entry[f"choice_{letter}"] for letter in "abcd" if f"choice_{letter}" in entry],
            },
        )
        for entry in data["questions"]
    ]


def _file(folder: Path) -> Path:
    where = "from https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
    return need_file(folder, "SEED-Bench.json", benchmark_name="seedbench", where=where)


def _media(entry: Row) -> str:
    media = entry["data_id"]
    return str(media[0] if isinstance(media, list) else media)


def parse_corrected(text: str) -> str:
    """The letter that the answer begins with, or that 'the answer is' names; '' if none."""
    found = LETTER.match(text)
    return (found[1] or found[2]).upper() if found else ""


def logged_key(row: Row) -> str | None:
    """The question's id in an lmms-eval row."""
    for entry in (row.get("seed_all"), row.get("doc")):
        if isinstance(entry, dict) and "question_id" in entry:
            return str(entry["question_id"])
    return None


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Accuracy per question type, over all, over images and over videos."""
    questions = load(folder)
    matched = match(
        questions,
        answers,
        options,
        name="seedbench",
        logged_key=logged_key,
    )
    items = [score_one(question, answer) for question, answer in zip(questions, matched.answers, strict=True)]
    metrics = numbers(items, "score")
    for name, part in parts(items).items():
        if part:
            metrics[f"lmms_eval.seed_{name}"] = mean([item["score_lmms_eval"] for item in part])
    if options.corrected:
        for name, part in parts(items).items():
            if part:
                metrics[f"corrected_{name}_accuracy_percent"] = 100 * mean([item["score_corrected"] for item in part])
    unread = sum(not item["missing"] and not parse_corrected(item["answer"]) for item in items)
    return Scored(metrics=metrics, items=items, counts={**matched.counts, "no_letter": unread}, notes=matched.notes)


def parts(items: Sequence[Item]) -> dict[str, list[Item]]:
    """All questions, those on images, those on videos."""
    return {
        "all": list(items),
        "image": [item for item in items if item["data_type"] == "image"],
        "video": [item for item in items if item["data_type"] == "video"],
    }


def score_one(question: Question, answer: Answer | None) -> Item:
    """One question's item."""
    text = text_of(answer)
    return {
        **shown(question, answer),
        "score": int(text == question.truth),
        "question_type_id": question.extra["type"],
        "data_type": question.extra["media"],
        "score_lmms_eval": float(text.strip()[:1].lower() == question.truth.lower()),
        "score_corrected": int(parse_corrected(text) == question.truth),
        "choices": question.extra["choices"],
    }


def numbers(items: Sequence[Item], field: str) -> dict[str, float]:
    """The official script's printed percentages, and the same unrounded."""
    types = by_group(items, "category", field)
    printed = {name: round(100 * mean(values), 2) for name, values in types.items()}
    exact = {}
    for part, name in (("all", "Total accuracy"), ("image", "image accuracy"), ("video", "video accuracy")):
        if chosen := parts(items)[part]:
            exact[f"{part}_accuracy_percent"] = 100 * mean([item[field] for item in chosen])
            printed[name] = round(exact[f"{part}_accuracy_percent"], 2)
    counts = {name: {"correct": sum(values), "count": len(values)} for name, values in types.items()}
    return flatten({**exact, "printed_percent": printed, "correct_and_count_per_type": counts})


def statistic(items: Sequence[Item]) -> Statistic:
    """Accuracy over all questions, percent."""
    return mean_statistic([item["score"] for item in items])


def submission(folder: Path, answers: Answers, output: Path) -> None:
    """The leaderboard's file: ``{question_id, prediction}`` a line, in the annotations' order."""
    texts = {str(answer.id): answer.text for answer in answers.rows if answer.text is not None}
    identifiers = [entry["question_id"] for entry in read_json(_file(folder))["questions"]]
    if missing := [identifier for identifier in identifiers if str(identifier) not in texts]:
        raise ValueError(
            f"{len(missing)} questions have no answer in {answers.path}, first {missing[0]}; the server wants all"
        )
    lines = [json.dumps({"question_id": name, "prediction": texts[str(name)]}) + "\n" for name in identifiers]
    with whole_file(output) as aside:
        aside.write_text("".join(lines), encoding="utf-8")


BENCHMARK = Benchmark(
    name="seedbench",
    title="SEED-Bench",
    headline="all_accuracy_percent",
    folders=("seed_bench", "seedbench", "seed-bench"),
    questions=("llava-seed-bench.jsonl", "llava-seed-bench*.jsonl"),
    image_folders=("",),
    tasks=("seedbench", "seedbench_lite"),
    annotations=("SEED-Bench.json",),
    load=load,
    score=score,
    statistic=statistic,
    submission=submission,
)
