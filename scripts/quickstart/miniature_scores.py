"""Scores of the LLaVA miniature's answers, in files that `llm2clip compare` reads."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniature_data import CLOSED, OPEN, Row

from llava_integration.evaluator.benchmarks.answers import read_jsonl
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.hashes import sha256_file

EMPTY = frozenset(
    "a an and at by for from in into it of off on or over the to up with without".split()
)


def score(output: Path, name: str, note: str, teacher: Any) -> None:
    """Write a file for each kind of question to ``DIR/scores/NAME``, and print a line of each.
    ``side-seedN`` goes to ``DIR/scores/side/seedN``: ``llm2clip compare`` takes the files below
    ``side`` for its runs."""
    path = output / "data" / "questions.jsonl"
    answer_to: dict[str, str] = {}
    for row in read_jsonl(output / f"{name}.answers.jsonl"):
        answer_to[row["question_id"]] = row["text"].strip()
    of_kind: dict[str, list[Row]] = {}
    for row in read_jsonl(path):
        answered = {**row, "answer": answer_to[row["question_id"]]}
        of_kind.setdefault(row["kind"], []).append(answered)
    results: list[ScoreFile] = []
    for kind in CLOSED:
        if kind in of_kind:
            results.append(closed(kind, of_kind[kind], guesses(output)))
    if OPEN in of_kind:
        results.append(by_keyword(of_kind[OPEN]))
        if teacher:
            results.append(by_similarity(of_kind[OPEN], teacher))
    side, _, seed = name.partition("-")
    provenance = {
        "data": str(output / "data" / "images"),
        "data_sha256": sha256_file(path),
    }
    for result in results:
        notes = [note, *result.notes]
        scored = replace(result, model=side, notes=notes, provenance=provenance)
        kind = result.benchmark.removeprefix("miniature: ")
        file = kind.replace(", ", "-").replace(" ", "-")
        scored.write(output / "scores" / side / seed / f"{file}.scores.json")
        reached = next(iter(result.metrics.values()))
        score_text = f"{reached:5.1f} % of {len(result.items)} ({result.notes[-1]})"
        print(f"{name:>8}  {result.benchmark:31} {score_text}")


def closed(kind: str, rows: list[Row], guessed: dict[str, str]) -> ScoreFile:
    """The accuracy of exact answers; ``guessed``: question -> what a model that ignores the picture
    would say."""
    right = [float(row["answer"].lower() == row["truth"].lower()) for row in rows]
    right_blindly = [guessed.get(row["text"]) == row["truth"] for row in rows]
    blind = 100 * sum(right_blindly) / len(rows)
    note = f"without the picture, by the most frequent answer to the same question: {blind:.1f} %"
    metrics = {"accuracy": 100 * sum(right) / len(right), "without_looking": blind}
    return record(kind, rows, right, metrics, note)


def guesses(output: Path) -> dict[str, str]:
    """Question -> its most frequent answer in training: what a model that ignores the picture would
    say."""
    counts: dict[str, Counter[str]] = {}
    for row in json.loads((output / "data" / "finetune.json").read_text()):
        turns = row["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = question["value"].removeprefix("<image>\n")
            counts.setdefault(text, Counter())[answer["value"]] += 1
    most_frequent = {}
    for text, answers in counts.items():
        ((answer, _),) = answers.most_common(1)
        most_frequent[text] = answer
    return most_frequent


def words_of(text: str) -> set[str]:
    """The words of a text that say something."""
    return set(re.findall(r"[^\W\d_]+", text.lower())) - EMPTY


def by_keyword(rows: list[Row]) -> ScoreFile:
    """Whether an answer has a word of the emoji's name or keywords."""
    truths = [words_of(" ".join([row["truth"], *row["keywords"]])) for row in rows]
    hits = []
    for row in rows:
        said = words_of(row["answer"])
        hits.append([not truth.isdisjoint(said) for truth in truths])
    return against_exchanged(
        "word of the name or a keyword", f"{OPEN}, keyword", rows, hits
    )


def by_similarity(rows: list[Row], teacher: Any) -> ScoreFile:
    """The cosine of answer and name in the teacher's embeddings; 0 for an empty answer and for
    less."""
    answers = teacher.encode([row["answer"] or "?" for row in rows])
    names = teacher.encode([row["truth"] for row in rows])
    answer_ND = torch.nn.functional.normalize(answers, dim=-1)
    name_ND = torch.nn.functional.normalize(names, dim=-1)
    cosine_NN = (answer_ND @ name_ND.T).clamp(min=0).numpy()
    cosine_NN[[row["answer"] == "" for row in rows]] = 0
    return against_exchanged(
        "cosine with the name", f"{OPEN}, teacher", rows, cosine_NN
    )


def against_exchanged(
    metric: str, kind: str, rows: list[Row], scores: Any
) -> ScoreFile:
    """``scores``: answers x pictures. An answer scores the points that its own picture is above
    those of other emoji: what comes from the picture. A model which always says the same scores 0,
    however often it is right."""
    point_NN = 100 * np.array(scores, dtype=np.float64)
    concept_N = np.array([row["concept"] for row in rows])
    other_NN = concept_N[:, None] != concept_N
    right_N = point_NN.diagonal()  # of the answer's picture
    exchanged_N = (point_NN * other_NN).sum(1) / np.maximum(1, other_NN.sum(1))
    reached = float(right_N.mean())
    by_chance = float(exchanged_N.mean())
    metrics = {
        metric.replace(" ", "_"): reached,
        "pictures_exchanged": by_chance,
        "above": reached - by_chance,
    }
    note = f"{metric}; with the pictures exchanged: {by_chance:.1f} %"
    return record(kind, rows, (right_N - exchanged_N).tolist(), metrics, note)


def record(
    kind: str,
    rows: list[Row],
    scores: list[float],
    metrics: dict[str, float],
    note: str,
) -> ScoreFile:
    """A score file whose items are ``rows`` with ``scores``."""
    items = []
    for row, value in zip(rows, scores, strict=True):
        item = {"id": row["question_id"], "question": row["text"], "score": value}
        for field in ("cluster", "category", "answer", "truth", "image"):
            item[field] = row[field]
        items.append(item)
    counts = {
        "questions": len(items),
        "clusters": len({item["cluster"] for item in items}),
    }
    return ScoreFile(
        benchmark=f"miniature: {kind}",
        metrics=metrics,
        items=items,
        counts=counts,
        notes=[note],
    )
