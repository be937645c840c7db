"""Scores of the LLaVA miniature's answers, as files for `llm2clip compare`.

Closed questions are right or wrong. An open answer, the name of an emoji, is scored twice: whether it has a word of the
emoji's name or keywords, and by the cosine of answer and name in the embeddings of a teacher. What is compared is how
many points that is above the same answer against the pictures of all other emoji: what comes from the picture.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ScoreFile, sha256_file

CLOSED, OPEN = ("emoji group", "easy-vqa"), "emoji name"
# words that say nothing about a picture
EMPTY = frozenset("a an and at by for from in into it of off on or over the to up with without".split())
Row = dict[str, Any]  # a held-out question with its "answer"


class Teacher:
    """The LLM that embeds answers and names, loaded at the first call."""

    def __init__(self, llm: Path, adapter: Path | None) -> None:
        self.llm, self.adapter, self._encoder = llm, adapter, None

    def cosines(self, answers: Sequence[str], names: Sequence[str]) -> list[list[float]]:
        """answers x names."""
        import torch

        from llm2clip_plugin.text.config import EncoderConfig
        from llm2clip_plugin.text.encoder import CaptionEncoder

        if self._encoder is None:
            self._encoder = CaptionEncoder(EncoderConfig(llm=str(self.llm), adapter=str(self.adapter or "")))
        answer_nW, name_nW = (
            torch.nn.functional.normalize(self._encoder.encode(texts), dim=-1) for texts in (answers, names)
        )
        return (answer_nW @ name_nW.T).tolist()


def refuse_other_stages(output: Path, after: str) -> None:
    """Raise ValueError if a stage of ``after`` or ``after-seedN`` had other options than before's, the tower aside."""
    for stage in ("llava-{}-pretrain", "llava-{}", "llava-lora-{}"):
        files = [output / f"{stage.format(name)}.options" for name in (after, after.replace("after", "before", 1))]
        if not files[0].exists() and stage != "llava-{}-pretrain":
            continue  # the other language model's
        new, base = (path.read_text().splitlines() for path in files)
        of_side = {
            place + 1 for place, word in enumerate(new) if word in ("--vision_tower", "--pretrain_mm_mlp_adapter")
        }
        if len(new) != len(base):
            raise ValueError(f"{files[0]} and {files[1]} have {len(new)} and {len(base)} words; delete {output}")
        for place, words in enumerate(zip(base, new, strict=True)):
            if words[0] != words[1] and place not in of_side:
                raise ValueError(
                    f"{files[0]} has {words[1]!r} where {files[1]} has {words[0]!r}: the two sides were not trained "
                    f"alike; delete {output}"
                )


def score(output: Path, name: str, note: str, teacher: Teacher | None) -> None:
    """Write a file for each kind of question to ``DIR/scores/NAME``, and print a line of each.

    ``side-seedN`` goes to ``DIR/scores/side/seedN``: ``llm2clip compare`` takes the files below ``side`` for its runs.
    """
    questions = output / "data" / "questions.jsonl"
    answers = map(json.loads, (output / f"{name}.answers.jsonl").read_text().splitlines())
    answer_to = {answer["question_id"]: answer["text"].strip() for answer in answers}
    held_out = [json.loads(line) for line in questions.read_text().splitlines()]
    rows = [{**row, "answer": answer_to[row["question_id"]]} for row in held_out]
    results = [closed(kind, [row for row in rows if row["kind"] == kind], guesses(output)) for kind in CLOSED]
    named = [row for row in rows if row["kind"] == OPEN]
    results += [by_keyword(named), by_teacher(named, teacher)]
    side, _, seed = name.partition("-")
    for result in filter(None, results):
        provenance = {"data": str(output / "data" / "images"), "data_sha256": sha256_file(questions)}
        made = dataclasses.replace(result, model=side, notes=[note, *result.notes], provenance=provenance)
        file = result.benchmark.removeprefix("miniature: ").replace(", ", "-").replace(" ", "-")
        made.write(output / "scores" / side / seed / f"{file}.scores.json")
        reached = next(iter(result.metrics.values()))
        print(f"{name:>8}  {result.benchmark:31} {reached:5.1f} % of {len(result.items)} ({result.notes[-1]})")


def closed(kind: str, rows: list[Row], guessed: dict[str, str]) -> ScoreFile | None:
    """The accuracy of exact answers; ``guessed``: question -> what a model that ignores the picture would say."""
    if not rows:
        return None
    right = [float(row["answer"].lower() == row["truth"].lower()) for row in rows]
    blind = 100 * sum(guessed.get(row["text"]) == row["truth"] for row in rows) / len(rows)
    return record(
        kind,
        rows,
        right,
        {"accuracy": 100 * sum(right) / len(right), "without_looking": blind},
        f"without the picture, by the most frequent answer to the same question: {blind:.1f} %",
    )


def guesses(output: Path) -> dict[str, str]:
    """Question -> its most frequent answer in training: what a model that ignores the picture would say."""
    counts: dict[str, Counter[str]] = {}
    for row in json.loads((output / "data" / "finetune.json").read_text()):
        said = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            counts.setdefault(question, Counter())[answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def words_of(text: str) -> set[str]:
    """The words of a text that say something."""
    return set(re.findall(r"[^\W\d_]+", text.lower())) - EMPTY


def by_keyword(rows: list[Row]) -> ScoreFile | None:
    """Whether an answer has a word of the emoji's name or keywords."""
    if not rows:
        return None
    truths = [words_of(" ".join([row["truth"], *row["keywords"]])) for row in rows]
    answers = [words_of(row["answer"]) for row in rows]
    hits = [[float(not truth.isdisjoint(answer)) for truth in truths] for answer in answers]
    return against_exchanged("word of the name or a keyword", f"{OPEN}, keyword", rows, hits)


def by_teacher(rows: list[Row], teacher: Teacher | None) -> ScoreFile | None:
    """The cosine of answer and name; 0 for an empty answer and for less."""
    if not rows or teacher is None:
        return None
    cosines = teacher.cosines([row["answer"] or "?" for row in rows], [row["truth"] for row in rows])
    scores = [[max(0.0, c) if row["answer"] else 0.0 for c in cs] for row, cs in zip(rows, cosines, strict=True)]
    return against_exchanged("cosine with the name", f"{OPEN}, teacher", rows, scores)


def against_exchanged(metric: str, kind: str, rows: list[Row], scores: list[list[float]]) -> ScoreFile:
    """``scores``: answers x pictures. An answer scores the points that its own picture is above those of other emoji.

    So a model that always says the same scores 0, however often it happens to be right.
    """
    own = [100 * scores[place][place] for place in range(len(rows))]
    exchanged = []
    for row, values in zip(rows, scores, strict=True):
        others = [value for other, value in zip(rows, values, strict=True) if other["cluster"] != row["cluster"]]
        exchanged.append(100 * sum(others) / max(1, len(others)))
    above = [a - b for a, b in zip(own, exchanged, strict=True)]
    reached, by_chance = (sum(values) / len(values) for values in (own, exchanged))
    metrics = {metric.replace(" ", "_"): reached, "pictures_exchanged": by_chance, "above": reached - by_chance}
    return record(kind, rows, above, metrics, f"{metric}; with the pictures exchanged: {by_chance:.1f} %")


def record(kind: str, rows: list[Row], scores: list[float], metrics: dict[str, float], note: str) -> ScoreFile:
    """A score file whose items are ``rows`` with ``scores``."""
    items = [
        {
            "id": row["question_id"],
            "cluster": row["cluster"],
            "score": value,
            "category": row["category"],
            "question": row["text"],
            "answer": row["answer"],
            "truth": row["truth"],
            "image": row["image"],
        }
        for row, value in zip(rows, scores, strict=True)
    ]
    counts = {"questions": len(items), "clusters": len({item["cluster"] for item in items})}
    return ScoreFile(benchmark=f"miniature: {kind}", metrics=metrics, items=items, counts=counts, notes=[note])
