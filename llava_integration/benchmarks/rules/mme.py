"""MME: two yes/no questions an image, 14 subtasks; a subtask scores 100 x accuracy + 100 x accuracy of whole pairs.

Rule of its ``eval_tool/calculation.py`` after LLaVA's ``convert_answer_to_mme.py``: the first four characters of the
lower-cased answer decide: 'yes' in them, else 'no' in them, else other, which is wrong ('Not sure' and 'Snow' are no,
'Y' is other). The official tool takes two consecutive lines for an image; here a pair is the two questions of an image
file, whatever the order. Perception sums ten subtasks (2000), cognition four (800). ``corrected`` reads the first word
yes or no of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_jsonl, read_text
from llava_integration.benchmarks.base import (
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    flatten,
    optional_file,
    ratio,
    shown,
    text_of,
)
from llava_integration.benchmarks.match import match, squeeze

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUFFIXES = ("answer the question using a single word or phrase.", "please answer yes or no.")
FIRST_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def plain(question: str) -> str:
    """A question without LLaVA's and MME's suffixes, squeezed."""
    text = squeeze(question)
    for suffix in SUFFIXES:
        text = text.replace(suffix, "")
    return text.strip()


def load(folder: Path) -> list[Question]:
    """The questions of all subtasks found, in the tool's order and LLaVA's within a subtask; two a file."""
    root = folder / "MME_Benchmark_release_version"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{folder} has no MME_Benchmark_release_version (a folder a subtask, a .txt an image); ask for it as "
            "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation says"
        )
    images = _images(folder)
    questions = []
    for category in (*PERCEPTION, *COGNITION):
        inner = root / category / "questions_answers_YN"
        source = inner if inner.is_dir() else root / category
        order = {stem: place for place, (known, stem) in enumerate(images) if known == category}
        for path in sorted(source.glob("*.txt"), key=lambda path: (order.get(path.stem, len(images)), path.name)):
            questions += _pair(path, category, images)
    if not questions:
        raise FileNotFoundError(f"{root} holds none of MME's subtasks ({', '.join(PERCEPTION)} ...)")
    return questions


def _images(folder: Path) -> dict[tuple[str, str], str]:
    """Image paths by (subtask, file stem), from LLaVA's question file if it is there."""
    path = optional_file(folder, *BENCHMARK.questions)
    rows = read_jsonl(path) if path else []
    return {(row["category"], Path(row["image"]).stem): row["image"] for row in rows}


def _pair(path: Path, category: str, images: dict[tuple[str, str], str]) -> list[Question]:
    """The questions of one image's file: ``question<TAB>Yes|No`` a line."""
    questions = []
    for nth, line in enumerate(line for line in read_text(path).split("\n") if line.strip()):
        fields = line.strip().split("\t")
        if len(fields) != 2 or fields[1].lower() not in ("yes", "no"):
            raise ValueError(f"{path}, line {nth + 1}: expected 'question<TAB>Yes' or No, got {line!r}")
        questions.append(
            Question(
                id=f"{category}/{path.stem}/{nth}",
                text=plain(fields[0]),
                cluster=f"{category}/{path.stem}",
                truth=fields[1].lower(),
                image=images.get((category, path.stem), f"{category}/{path.stem}.jpg"),
                category=category,
                extra={"file": path.name, "nth": nth},
            )
        )
    return questions


def parse(text: str) -> str:
    """'yes', 'no' or 'other', as the official tool reads it."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def parse_corrected(text: str) -> str:
    """The first word yes or no, in any case; 'other' without one."""
    found = FIRST_WORD.search(text)
    return found[1].lower() if found else "other"


def parse_lmms_eval(text: str) -> str:
    """lmms-eval's reading: stripped, full stops deleted, single letters accepted."""
    text = text.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return parse(text)


def _key(identifier: object, prompt: str) -> tuple[str, str] | None:
    """(subtask/stem, question) of a row; the id is LLaVA's image path, or lmms-eval's like it."""
    name = str(identifier)
    if "/" not in name:
        return None
    # the official converter cuts the file name at its first full stop
    return f"{name.split('/')[0]}/{name.split('/')[-1].split('.')[0]}", plain(prompt)


def _logged_key(row: Row) -> tuple[str, str] | None:
    prompt = row.get("input") or (row.get("doc") or {}).get("question", "")
    while isinstance(prompt, list) and prompt:
        prompt = prompt[0]
    # releases up to v0.2.4 spelled it percetion
    for name in ("mme_perception_score", "mme_percetion_score", "mme_cognition_score"):
        if isinstance(entry := row.get(name), dict):
            return _key(entry["question_id"], str(prompt))
    return None


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Scores of the subtasks and their sums."""
    questions = load(folder)
    matched = match(
        questions,
        answers,
        options,
        name="mme",
        question_key=lambda question: (question.cluster, question.text),
        answer_key=lambda answer: _key(answer.id, answer.prompt),
        logged_key=_logged_key,
    )
    items = [score_one(question, answer) for question, answer in zip(questions, matched.answers, strict=True)]
    counts = {**matched.counts, "other": sum(item["parsed"] == "other" and not item["missing"] for item in items)}
    metrics = numbers(items, "parsed")
    logged = numbers(items, "parsed_lmms_eval")
    metrics["lmms_eval.mme_perception_score"] = logged["perception"]
    metrics["lmms_eval.mme_cognition_score"] = logged["cognition"]
    if options.corrected:
        for name in ("perception", "cognition", "total"):
            metrics[f"corrected_{name}"] = numbers(items, "parsed_corrected")[name]
    return Scored(metrics=metrics, items=items, counts=counts, notes=matched.notes)


def score_one(question: Question, answer: Answer | None) -> Item:
    """One question's item; a missing answer is 'other', so wrong."""
    text = text_of(answer)
    return {
        **shown(question, answer),
        "score": int(parse(text) == question.truth),
        "file": question.extra["file"],
        "nth": question.extra["nth"],
        "question_id": question.image,
        "gt": question.truth,
        "parsed": parse(text),
        "parsed_lmms_eval": parse_lmms_eval(text),
        "parsed_corrected": parse_corrected(text),
    }


def numbers(items: Sequence[Item], field: str) -> dict[str, float]:
    """Each subtask's numbers and the sums; precision and recall leave out 'other', as the tool does."""
    categories = {}
    for category in (*PERCEPTION, *COGNITION):
        if chosen := [item for item in items if item["category"] == category]:
            categories[category] = subtask(chosen, field)
    sums = {
        "perception": sum(categories[name]["score"] for name in PERCEPTION if name in categories),
        "cognition": sum(categories[name]["score"] for name in COGNITION if name in categories),
    }
    return flatten({"categories": categories, **sums, "total": sums["perception"] + sums["cognition"]})


def subtask(items: Sequence[Item], field: str) -> dict[str, float]:
    """One subtask: confusion counts, accuracy, accuracy of whole images, score."""
    pairs = [(item[field], item["gt"]) for item in items]
    true_yes, false_no = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    true_no, false_yes = pairs.count(("no", "no")), pairs.count(("yes", "no"))
    whole: dict[str, bool] = {}
    for item in items:
        whole[item["cluster"]] = whole.get(item["cluster"], True) and item[field] == item["gt"]
    accuracy = (true_yes + true_no) / len(pairs)
    accuracy_plus = sum(whole.values()) / len(whole)
    return {
        "TP": true_yes,
        "FN": false_no,
        "TN": true_no,
        "FP": false_yes,
        "precision": true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0,
        "recall": true_yes / (true_yes + false_no) if true_yes + false_no else 0.0,
        "other_num": sum(parsed == "other" for parsed, _ in pairs),
        "acc": accuracy,
        "acc_plus": accuracy_plus,
        "score": accuracy * 100 + accuracy_plus * 100,
    }


def _sums(items: Sequence[Item], categories: Sequence[str]) -> Statistic:
    """Sum over subtasks of 100 x right/questions + 100 x whole pairs/images; images resampled within a subtask."""
    right: dict[str, bool] = {}
    for item in items:
        right[item["cluster"]] = right.get(item["cluster"], True) and bool(item["score"])
    sums = np.zeros((len(items), 4 * len(categories)))
    seen: set[str] = set()
    for row, item in enumerate(items):
        if item["category"] in categories:
            column = 4 * categories.index(item["category"])
            sums[row, column : column + 2] = item["score"], 1
            if item["cluster"] not in seen:  # an image's pair is counted at its first question
                seen.add(item["cluster"])
                sums[row, column + 2 : column + 4] = right[item["cluster"]], 1

    def value(totals: np.ndarray) -> np.ndarray:
        accuracy = ratio(totals[..., 0::4], totals[..., 1::4])
        whole = ratio(totals[..., 2::4], totals[..., 3::4])
        return 100 * (accuracy + whole).sum(axis=-1)

    names = sorted({item["category"] for item in items})
    return Statistic(
        sums,
        value,
        strata=np.array([names.index(item["category"]) for item in items]),
        counted=sums[:, 1::4].sum(axis=1) > 0,
    )


def statistic(items: Sequence[Item]) -> Statistic:
    """Perception, of 2000: what LLaVA's table calls MME."""
    return _sums(items, PERCEPTION)


BENCHMARK = Benchmark(
    name="mme",
    title="MME perception",
    headline="perception",
    unit="points",
    folders=("MME", "mme"),
    questions=("llava_mme.jsonl", "llava_mme*.jsonl"),
    image_folders=("MME_Benchmark_release_version", ""),
    item_fields=("category", "cluster"),
    tasks=("mme",),
    annotations=("MME_Benchmark_release_version/**/*.txt",),
    load=load,
    score=score,
    statistic=statistic,
)
