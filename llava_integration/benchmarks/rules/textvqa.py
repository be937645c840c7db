"""TextVQA, val 0.5.1: ten human answers, read with the M4C evaluator as LLaVA's ``eval_textvqa.py`` does.

An answer line is joined by its image and the question parsed out of its *prompt*. Annotations with the same image and
question are one for the official script, the last; unanswered questions cost nothing, since it divides by the number of
answer lines. ``corrected`` scores each annotation on its own and an unanswered question as 0.
"""

from __future__ import annotations

import re
from collections import defaultdict
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
    mean,
    mean_statistic,
    need_file,
    shown,
    text_of,
)
from llava_integration.benchmarks.match import match
from llava_integration.benchmarks.vqa_text import m4c, m4c_accuracy

TOKENS_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def load(folder: Path) -> list[Question]:
    """The annotated questions, in the file's order."""
    path = need_file(
        folder,
        "TextVQA_0.5.1_val.json",
        "TextVQA*val*.json",
        benchmark_name="textvqa",
        where="https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
    )
    return [
        Question(
            id=entry["question_id"],
            text=entry["question"],
            cluster=entry["image_id"],
            truth=entry["answers"],
            image=f"{entry['image_id']}.jpg",
            category=(entry.get("image_classes") or [""])[0],
        )
        for entry in read_json(path)["data"]
    ]


def question_of(prompt: str) -> str | None:
    """The question in one of LLaVA's four prompt forms, lower case; None in any other."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = TOKENS_FIRST.search(prompt)
        return found[1].lower() if found else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


class Numbering:
    """Which annotation the k-th answer to the same image and question is: the k-th, and the last ever after."""

    def __init__(self, questions: Sequence[Question]):
        self.groups: dict[tuple[str, str], list[Question]] = defaultdict(list)
        for question in questions:
            self.groups[question.cluster, question.text.lower()].append(question)
        self.seen: dict[tuple[str, str], int] = defaultdict(int)

    def last(self, question: Question) -> Question:
        """The annotation that the official script takes for this one."""
        return self.groups[question.cluster, question.text.lower()][-1]

    def key(self, answer: Answer) -> str | None:
        """The id of the annotation that an answer belongs to."""
        if not answer.prompt:
            return str(answer.id)  # a submission: ids are the annotations' own
        text = question_of(answer.prompt)
        group = self.groups.get((str(answer.id), text)) if text is not None else None
        if not group:
            return None
        place = self.seen[str(answer.id), group[0].text.lower()]
        self.seen[str(answer.id), group[0].text.lower()] += 1
        return str(group[min(place, len(group) - 1)].id)


def logged_key(row: Row) -> str | None:
    """The annotation's id in an lmms-eval row."""
    entry = row.get("submission")
    document = row.get("doc")
    for source in (entry, document):
        if isinstance(source, dict) and "question_id" in source:
            return str(source["question_id"])
    return None


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Mean accuracy over the answer lines."""
    questions = load(folder)
    numbering = Numbering(questions)
    matched = match(
        questions,
        answers,
        options,
        name="textvqa",
        answer_key=numbering.key,
        logged_key=logged_key,
    )
    numbers = {answer.line: place for place, answer in enumerate(answers.rows)}
    items = [
        score_one(question, numbering.last(question), answer, numbers)
        for question, answer in zip(questions, matched.answers, strict=True)
    ]
    given = [item for item in items if not item["missing"]]
    metrics = {
        "samples": float(len(given)),
        "accuracy_percent": 100 * mean([item["score"] for item in given]),
        "accuracy_printed": round(100 * mean([item["score"] for item in given]), 2),
        "lmms_eval.exact_match": mean([item["score_own_annotation"] for item in given]),
    }
    if options.corrected:
        metrics["corrected_accuracy_percent"] = 100 * mean([item["score_own_annotation"] for item in items])
    return Scored(metrics=metrics, items=items, counts=matched.counts, notes=matched.notes)


def score_one(own: Question, official: Question, answer: Answer | None, numbers: dict[int, int]) -> Item:
    """One annotation's item; ``line`` is the answer's place in the file, from 0."""
    text = text_of(answer)
    return {
        **shown(own, answer),
        "score": m4c_accuracy(text, official.truth) if answer else 0.0,
        "line": numbers[answer.line] if answer else -1,
        "question_id": own.cluster,  # LLaVA's question_id is the image's
        "annotation_question_id": official.id,
        "normalized": m4c(text),
        "score_own_annotation": m4c_accuracy(text, own.truth) if answer else 0.0,
        "truth": official.truth,
    }


def statistic(items: Sequence[Item]) -> Statistic:
    """Mean accuracy over the answered questions, percent."""
    return mean_statistic([item["score"] for item in items], [not item.get("missing") for item in items])


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    headline="accuracy_percent",
    folders=("textvqa",),
    questions=("llava_textvqa*.jsonl",),
    image_folders=("train_images", "train_val_images/train_images", "images", ""),
    tasks=("textvqa_val", "textvqa_val_lite", "textvqa"),
    annotations=("TextVQA*val*.json",),
    load=load,
    score=score,
    statistic=statistic,
)
