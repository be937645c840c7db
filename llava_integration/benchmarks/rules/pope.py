"""POPE on COCO: is an object in the image? Three ways to choose the absent objects; the headline is their mean F1.

Rule of LLaVA's ``eval_pope.py``: the text up to the first full stop, commas deleted, split at spaces; 'no' if a word is
exactly 'No', 'no' or 'not', else 'yes' (so 'Nope' and '' are yes, and 'Yes, no doubt' is no). The official script pairs
answers with labels by order; here they are joined by image and question, and the numbers by order are reported under
``by_order`` where they differ. An unanswered question is not counted, as in the official script. ``corrected`` reads
the first yes or no of the answer in any case, and counts neither, and no answer, as wrong.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_jsonl
from llava_integration.benchmarks.benchmark import (
    Benchmark,
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    flatten,
    item_of,
    mean,
    precision_recall_f1,
    published_scores,
    ratio,
    squeeze,
    text_of,
)

WORD = re.compile(r"\b(yes|yeah|yep|no|not|nope|none|cannot|can't|isn't|aren't)\b", re.IGNORECASE)
YES = ("yes", "yeah", "yep")
AVERAGED = ("accuracy", "precision", "recall", "f1", "yes_ratio")


class POPE(Benchmark):
    """Accuracy, precision, recall and F1 of each category and their plain means."""

    def load(self, folder: Path) -> list[Question]:
        """LLaVA's questions with the label of (category, image, question), in the question file's order."""
        path = self.require(folder, *self.question_files, where="it is in LLaVA's eval.zip")
        labels: dict[tuple[str, str, str], list[Row]] = {}
        for category, rows in read_labels(folder).items():
            for row in rows:
                labels.setdefault((category, row["image"], squeeze(row["text"])), []).append(row)
        questions, used = [], Counter()
        for row in read_jsonl(path):
            text = row["text"].split("\n")[0]
            key = (row["category"], row["image"], squeeze(text))
            known = labels.get(key)
            if not known:
                raise ValueError(
                    f"{path}: question {row['question_id']} ({row['category']}, {row['image']}, {text!r}) has no label "
                    f"in {folder}/coco; the label files are from another release of POPE"
                )
            label = known[min(used[key], len(known) - 1)]
            used[key] += 1
            questions.append(
                Question(
                    id=row["question_id"],
                    text=text,
                    cluster=row["image"],
                    truth=label["label"],
                    image=row["image"],
                    category=row["category"],
                    extra={"label_id": str(label["question_id"])},
                )
            )
        return questions

    def prepare(self, questions: list[Question], answers: Answers) -> tuple[list[Question], Answers]:
        """LLaVA's question ids for lmms-eval's rows."""
        return questions, with_llava_ids(questions, answers) if answers.layout == "lmms_eval" else answers

    def logged_key(self, answer: Answer) -> str | None:
        """LLaVA's id, from ``prepare``."""
        return answer.row["llava_id"]

    def recognizes(self, answer: Answer) -> bool:
        """By the question."""
        return answer.prompt.startswith("Is there a") and "in the image?" in answer.prompt

    def score(self, folder: Path, answers: Answers, options: Options) -> Scored:
        """Adds the official script's numbers where the order of the answers changes them."""
        scored = super().score(folder, answers, options)
        ordered = by_order(folder, scored.items, answers) if answers.layout == "llava" else {}
        if any(abs(scored.metrics[key] - value) > 1e-12 for key, value in ordered.items() if key in scored.metrics):
            scored.metrics.update({f"by_order.{key}": value for key, value in ordered.items()})
            scored.notes.append(
                "the answers are not in the labels' order, or some are missing: the official script, which joins by "
                f"order, gives mean F1 {ordered[self.headline]:.4f}; joined by question it is "
                f"{scored.metrics[self.headline]:.4f}"
            )
        return scored

    def score_item(self, question: Question, answer: Answer | None) -> Item:
        """``parsed``: yes, no or missing; ``parsed_corrected``: other, too."""
        text = text_of(answer)
        parsed = parse(text) if answer else "missing"
        return item_of(
            question,
            answer,
            score=int(parsed == question.truth),
            parsed=parsed,
            label=question.truth,
            parsed_corrected=parse_corrected(text) if answer else "missing",
            parsed_lmms_eval=text.lower().strip(),
        )

    def counts(self, items: Sequence[Item]) -> dict[str, int]:
        """Answers that are neither yes nor no."""
        return {"neither": sum(item["parsed_corrected"] == "other" for item in items)}

    def metrics(self, items: Sequence[Item]) -> dict[str, float]:
        """By the official rule, by lmms-eval's, and corrected."""
        corrected = numbers([{**item, "missing": False} for item in items], "parsed_corrected")
        return {
            **numbers(items, "parsed"),
            **{f"lmms_eval.pope_{name}": value for name, value in lmms_eval_numbers(items).items()},
            **{f"corrected_{name}": value for name, value in corrected.items()},
        }

    def statistic(self, items: Sequence[Item]) -> Statistic:
        """Mean over the categories of F1, percent."""
        categories = sorted({item["category"] for item in items})
        sums = np.zeros((len(items), 3 * len(categories)))
        for row, item in enumerate(items):
            if not item.get("missing"):
                column = 3 * categories.index(item["category"])
                said, true = item["parsed"] == "yes", item["label"] == "yes"
                sums[row, column : column + 3] = said and true, said, true

        def value(totals: np.ndarray) -> np.ndarray:
            # F1 = 2 TP / (predicted + actual)
            return 100 * ratio(2 * totals[..., 0::3], totals[..., 1::3] + totals[..., 2::3]).mean(axis=-1)

        return Statistic(sums, value)


def read_labels(folder: Path) -> dict[str, list[Row]]:
    """The label files' rows by category."""
    paths = sorted((folder / "coco").glob("coco_pope_*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}/coco has no coco_pope_*.json; from https://github.com/AoiDragon/POPE (output/coco)"
        )
    return {path.stem.removeprefix("coco_pope_"): read_jsonl(path) for path in paths}


def parse(text: str) -> str:
    """'yes' or 'no', as the official script reads it."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_corrected(text: str) -> str:
    """'yes', 'no', or 'other' where the answer has neither."""
    word = WORD.search(text)
    return "other" if word is None else "yes" if word[1].lower() in YES else "no"


def confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Numbers of one category from (parsed, label) pairs; what cannot be divided is 0.

    A parse that is neither yes nor no is wrong: a false negative under 'yes'; under 'no' it only lowers the accuracy.
    """
    counts = Counter(pairs)
    true_yes, false_yes, true_no = counts["yes", "yes"], counts["yes", "no"], counts["no", "no"]
    false_no = sum(label == "yes" and parsed != "yes" for parsed, label in pairs)
    precision, recall, f1 = precision_recall_f1(true_yes, false_yes, false_no)
    return {
        "n": len(pairs),
        "TP": true_yes,
        "FP": false_yes,
        "TN": true_no,
        "FN": false_no,
        "accuracy": (true_yes + true_no) / len(pairs) if pairs else 0.0,
        "precision": precision,
        "recall": recall,
        "f1": f1,
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
    means = {name: mean([values[name] for values in categories.values()]) for name in AVERAGED}
    return flatten({"categories": categories, "average_over_categories": means})


def lmms_eval_numbers(items: Sequence[Item]) -> dict[str, float]:
    """lmms-eval's aggregates over all categories at once; its yes_ratio is that of the labels."""
    pairs = [(item["parsed_lmms_eval"], item["label"]) for item in items]
    counts = Counter(pairs)
    precision, recall, f1 = precision_recall_f1(counts["yes", "yes"], counts["yes", "no"], counts["no", "yes"])
    return {
        "accuracy": mean([float(parsed == label) for parsed, label in pairs]),
        "precision": precision,
        "recall": recall,
        "f1_score": f1,
        "yes_ratio": mean([float(label == "yes") for _, label in pairs]),
    }


def by_order(folder: Path, items: Sequence[Item], answers: Answers) -> dict[str, float]:
    """What the official script prints: a category's answers zipped to its label file's lines, the rest cut off."""
    category_of = {str(item["id"]): item["category"] for item in items}
    labels = read_labels(folder)
    categories = {}
    for category in dict.fromkeys(category_of.values()):
        said = [parse(answer.text or "") for answer in answers.rows if category_of.get(str(answer.id)) == category]
        truths = [row["label"] for row in labels[category]]
        values = confusion(list(zip(said, truths, strict=False)))  # cuts the longer, as the script does
        values["yes_ratio"] = mean([float(word == "yes") for word in said])  # over all answers given
        categories[category] = values
    return averaged(categories)


def with_llava_ids(questions: Sequence[Question], answers: Answers) -> Answers:
    """lmms-eval's rows with LLaVA's question id as ``llava_id``.

    A row has the id of the label file, which restarts in each category, and in old versions the whole document. So the
    log is cut where ids restart, and each piece belongs to the category that most of its questions agree with.
    """
    ids = {(q.category, q.extra["label_id"], squeeze(q.text)): str(q.id) for q in questions}
    truths = {(q.category, q.extra["label_id"]): q.truth for q in questions}
    categories = list(dict.fromkeys(question.category for question in questions))

    def agreement(piece: Sequence[Answer], category: str) -> tuple[int, int]:
        """How many questions are the category's; how many targets are its labels, where questions are ambiguous."""
        return (
            sum((category, *_label_key(answer)) in ids for answer in piece),
            sum(truths.get((category, _label_key(answer)[0])) == answer.row.get("target") for answer in piece),
        )

    rows = []
    for piece in _pieces(answers):
        best = max(categories, key=lambda category: agreement(piece, category))
        for answer in piece:
            document = answer.row.get("doc")
            category = document.get("category", best) if isinstance(document, dict) else best
            llava_id = ids.get((category, *_label_key(answer)))
            rows.append(replace(answer, row={**answer.row, "llava_id": llava_id}))
    return replace(answers, rows=tuple(rows))


def _pieces(answers: Answers) -> list[list[Answer]]:
    """The log's rows, cut where their ids restart."""
    pieces: list[list[Answer]] = []
    highest = None
    for answer in answers.rows:
        number = _label_number(answer.row)
        if not pieces or (highest is not None and number is not None and number <= highest):
            pieces.append([])
        highest = number if number is not None else highest
        pieces[-1].append(answer)
    return pieces


def _label_number(row: Row) -> int | None:
    entry = row.get("pope_accuracy")
    number = str(entry.get("question_id", "")) if isinstance(entry, dict) else ""
    return int(number) if number.isdigit() else None


def _label_key(answer: Answer) -> tuple[str, str]:
    return str(_label_number(answer.row)), squeeze(answer.prompt.split("\n")[0])


BENCHMARK = POPE(
    name="pope",
    title="POPE",
    order=6,
    headline="average_over_categories.f1",
    scale=100.0,
    unit="F1",
    folders=("pope",),
    annotations=("coco/coco_pope_*.json", "llava_pope*.jsonl"),
    question_files=("llava_pope_test.jsonl", "llava_pope*.jsonl"),
    image_folders=("val2014", "images", ""),
    lmms_eval_tasks=("pope", "pope_full"),
    item_fields=("category", "parsed", "label"),
    published=published_scores(llava_7b=85.9, llava_13b=85.9),
)
