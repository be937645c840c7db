"""POPE on COCO: is an object in the image? Three ways of choosing the absent objects; mean F1 is the headline.

Rule of LLaVA's ``eval_pope.py``: the text up to the first full stop, commas deleted, split at spaces; 'no' if a word is
exactly 'No', 'no' or 'not', else 'yes' (so 'Nope' and '' are yes, and 'Yes, no doubt' is no). The official script zips
answers to labels by order; here they are joined by image and question, and what order would have given is reported
under ``by_order`` where it differs. An unanswered question leaves n, as in the official script. ``corrected`` takes the
first yes or no of the answer whatever its case, and counts neither, and no answer, as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers, read_jsonl
from llava_integration.benchmarks.base import (
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    flatten,
    mean,
    need_file,
    ratio,
    shown,
    text_of,
)
from llava_integration.benchmarks.match import match, squeeze

WORD = re.compile(r"\b(yes|yeah|yep|no|not|nope|none|cannot|can't|isn't|aren't)\b", re.IGNORECASE)
YES = ("yes", "yeah", "yep")


def load(folder: Path) -> list[Question]:
    """LLaVA's questions with the label of (category, image, question), in the question file's order."""
    path = need_file(folder, *BENCHMARK.questions, benchmark_name="pope", where="it is in LLaVA's eval.zip")
    labels = read_labels(folder)
    questions, used = [], {}
    for row in read_jsonl(path):
        text = row["text"].split("\n")[0]
        key = (row["category"], row["image"], squeeze(text))
        known = labels.get(key)
        if not known:
            raise ValueError(
                f"{path}: question {row['question_id']} ({row['category']}, {row['image']}, {text!r}) has no label in "
                f"{folder}/coco: the label files are another release of POPE"
            )
        used[key] = used.get(key, -1) + 1
        label = known[min(used[key], len(known) - 1)]
        questions.append(
            Question(
                id=row["question_id"],
                text=text,
                cluster=row["image"],
                truth=label["label"],
                image=row["image"],
                category=row["category"],
                extra={"label_id": label["question_id"]},
            )
        )
    return questions


def read_labels(folder: Path) -> dict[tuple[str, str, str], list[dict]]:
    """The label files' rows by (category, image, question)."""
    found = sorted((folder / "coco").glob("coco_pope_*.json"))
    if not found:
        raise FileNotFoundError(
            f"{folder}/coco has no coco_pope_*.json; from https://github.com/AoiDragon/POPE (output/coco)"
        )
    labels: dict[tuple[str, str, str], list[dict]] = {}
    for path in found:
        category = path.stem.removeprefix("coco_pope_")
        for row in read_jsonl(path):
            labels.setdefault((category, row["image"], squeeze(row["text"])), []).append(row)
    return labels


def parse(text: str) -> str:
    """'yes' or 'no', as the official script reads it."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_corrected(text: str) -> str:
    """'yes', 'no', or 'other' where the answer says neither."""
    found = WORD.search(text)
    return "other" if found is None else "yes" if found[1].lower() in YES else "no"


def parse_lmms_eval(text: str) -> str:
    """The whole answer in lower case, and nothing else counts."""
    return text.lower().strip()


def score(folder: Path, answers: Answers, options: Options) -> Scored:
    """Accuracy, precision, recall and F1 of each category and their plain means."""
    questions = load(folder)
    if answers.layout == "lmms_eval":
        answers = _name_logged(questions, answers)
    matched = match(
        questions,
        answers,
        options,
        name="pope",
        logged_key=lambda row: row["llava_id"],
    )
    items = [score_one(question, answer) for question, answer in zip(questions, matched.answers, strict=True)]
    metrics = numbers(items, "parsed")
    metrics.update({f"lmms_eval.{key}": value for key, value in lmms_eval_numbers(items).items()})
    notes = list(matched.notes)
    ordered = by_order(folder, questions, answers) if answers.layout == "llava" else {}
    if any(abs(metrics[key] - value) > 1e-12 for key, value in ordered.items() if key in metrics):
        metrics.update({f"by_order.{key}": value for key, value in ordered.items()})
        notes.append(
            "the answers are not in the labels' order, or some are missing: the official script, which joins by order, "
            f"would give mean F1 {ordered['average_over_categories.f1']:.4f}; joined it is "
            f"{metrics['average_over_categories.f1']:.4f}"
        )
    if options.corrected:
        corrected = numbers([{**item, "missing": False} for item in items], "parsed_corrected")
        metrics.update({f"corrected_{key}": value for key, value in corrected.items()})
    neither = sum(item["parsed_corrected"] == "other" for item in items)
    return Scored(metrics=metrics, items=items, counts={**matched.counts, "neither": neither}, notes=notes)


def score_one(question: Question, answer: Answer | None) -> Item:
    """One question's item."""
    text = text_of(answer)
    parsed = parse(text) if answer else "missing"
    return {
        **shown(question, answer),
        "score": int(parsed == question.truth),
        "parsed": parsed,
        "label": question.truth,
        "parsed_corrected": parse_corrected(text) if answer else "missing",
        "parsed_lmms_eval": parse_lmms_eval(text),
    }


def confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Numbers of one category from (parsed, label) pairs; what cannot be divided is 0.

    A parse that is neither yes nor no is wrong: a false negative under 'yes'; under 'no' it only lowers the accuracy.
    """
    true_yes = sum(pair == ("yes", "yes") for pair in pairs)
    false_yes = sum(pair == ("yes", "no") for pair in pairs)
    true_no = sum(pair == ("no", "no") for pair in pairs)
    false_no = sum(label == "yes" and parsed != "yes" for parsed, label in pairs)
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    return {
        "n": len(pairs),
        "TP": true_yes,
        "FP": false_yes,
        "TN": true_no,
        "FN": false_no,
        "accuracy": (true_yes + true_no) / len(pairs) if pairs else 0.0,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(parsed == "yes" for parsed, _ in pairs) / len(pairs) if pairs else 0.0,
    }


def numbers(items: Sequence[Item], field: str) -> dict[str, float]:
    """Each category's numbers and the plain mean of the categories'."""
    categories: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        pairs = categories.setdefault(item["category"], [])
        if not item["missing"]:
            pairs.append((item[field], item["label"]))
    return averaged({category: confusion(pairs) for category, pairs in categories.items()})


def averaged(categories: dict[str, dict[str, float]]) -> dict[str, float]:
    """Flat metrics: the categories and ``average_over_categories``."""
    means = {
        name: mean([values[name] for values in categories.values()])
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }
    return flatten({"categories": categories, "average_over_categories": means})


def lmms_eval_numbers(items: Sequence[Item]) -> dict[str, float]:
    """lmms-eval's aggregates over all categories at once; its yes_ratio is that of the labels."""
    pairs = [(item["parsed_lmms_eval"], item["label"]) for item in items]
    true_yes = sum(pair == ("yes", "yes") for pair in pairs)
    false_yes = sum(pair == ("yes", "no") for pair in pairs)
    false_no = sum(pair == ("no", "yes") for pair in pairs)
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    return {
        "pope_accuracy": mean([float(parsed == label) for parsed, label in pairs]),
        "pope_precision": precision,
        "pope_recall": recall,
        "pope_f1_score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "pope_yes_ratio": mean([float(label == "yes") for _, label in pairs]),
    }


def by_order(folder: Path, questions: Sequence[Question], answers: Answers) -> dict[str, float]:
    """What the official script prints: a category's answers zipped to its label file's lines, the rest cut off."""
    category_of = {str(question.id): question.category for question in questions}
    labels: dict[str, list[str]] = {}
    for path in sorted((folder / "coco").glob("coco_pope_*.json")):
        labels[path.stem.removeprefix("coco_pope_")] = [row["label"] for row in read_jsonl(path)]
    categories = {}
    for category in dict.fromkeys(question.category for question in questions):
        said = [parse(answer.text or "") for answer in answers.rows if category_of.get(str(answer.id)) == category]
        values = confusion(list(zip(said, labels[category], strict=False)))  # cuts the longer, as the script does
        values["yes_ratio"] = mean([float(word == "yes") for word in said])  # over all answers given
        categories[category] = values
    return averaged(categories)


def _name_logged(questions: Sequence[Question], answers: Answers) -> Answers:
    """Give lmms-eval's rows LLaVA's question ids.

    A row has the id of the label file, which restarts in each category, and in old versions the whole document. So the
    log is cut where ids restart, and each piece belongs to the category with which most of its questions agree.
    """
    known = {(q.category, str(q.extra["label_id"]), squeeze(q.text)): q.id for q in questions}
    categories = list(dict.fromkeys(question.category for question in questions))
    pieces: list[list[Answer]] = []
    highest = None
    for answer in answers.rows:
        number = _logged_number(answer.row)
        if not pieces or (highest is not None and number is not None and number <= highest):
            pieces.append([])
        highest = number if number is not None else highest
        pieces[-1].append(answer)
    rows = []
    for piece in pieces:
        agreement = {
            category: sum((category, *_logged_key(answer)) in known for answer in piece) for category in categories
        }
        best = max(categories, key=lambda category: (agreement[category], _logged_truth(piece, questions, category)))
        for answer in piece:
            document = answer.row.get("doc")
            category = document.get("category", best) if isinstance(document, dict) else best
            name = known.get((category, *_logged_key(answer)))
            rows.append(
                Answer(**{**vars(answer), "row": {**answer.row, "llava_id": None if name is None else str(name)}})
            )
    return Answers(**{**vars(answers), "rows": tuple(rows)})


def _logged_number(row: dict) -> int | None:
    entry = row.get("pope_accuracy")
    number = str(entry.get("question_id", "")) if isinstance(entry, dict) else ""
    return int(number) if number.isdigit() else None


def _logged_key(answer: Answer) -> tuple[str, str]:
    return str(_logged_number(answer.row)), squeeze(answer.prompt.split("\n")[0])


def _logged_truth(piece: Sequence[Answer], questions: Sequence[Question], category: str) -> int:
    """How many of a piece's targets agree with a category's labels: decides where questions alone do not."""
    truths = {str(q.extra["label_id"]): q.truth for q in questions if q.category == category}
    return sum(truths.get(str(_logged_number(answer.row))) == answer.row.get("target") for answer in piece)


def statistic(items: Sequence[Item]) -> Statistic:
    """Mean over the categories of F1, percent."""
    categories = sorted({item["category"] for item in items})
    sums = np.zeros((len(items), 3 * len(categories)))
    for row, item in enumerate(items):
        if not item.get("missing"):
            column = 3 * categories.index(item["category"])
            sums[row, column] = item["parsed"] == "yes" and item["label"] == "yes"  # true positives
            sums[row, column + 1] = item["parsed"] == "yes"  # predicted
            sums[row, column + 2] = item["label"] == "yes"  # actual

    def value(totals: np.ndarray) -> np.ndarray:
        # F1 = 2 TP / (predicted + actual)
        return 100 * ratio(2 * totals[..., 0::3], totals[..., 1::3] + totals[..., 2::3]).mean(axis=-1)

    return Statistic(sums, value)


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    headline="average_over_categories.f1",
    scale=100.0,
    unit="F1",
    folders=("pope",),
    questions=("llava_pope_test.jsonl", "llava_pope*.jsonl"),
    image_folders=("val2014", "images", ""),
    item_fields=("category", "parsed", "label"),
    tasks=("pope", "pope_full"),
    annotations=("coco/coco_pope_*.json", "llava_pope*.jsonl"),
    load=load,
    score=score,
    statistic=statistic,
)
