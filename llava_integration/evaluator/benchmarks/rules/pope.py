"""POPE on COCO: is an object in the image? Three ways to choose the absent objects; the headline is
their mean F1.

Rule of LLaVA's ``eval_pope.py``: the text up to the first full stop, commas deleted, split at
spaces; 'no' if a word is exactly 'No', 'no' or 'not', else 'yes' (so 'Nope' and '' are yes, and
'Yes, no doubt' is no). The official script pairs answers with labels by order; here they are joined
by question. An unanswered question is not counted, as in the script.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import Answer, read_jsonl

AVERAGED = ("accuracy", "precision", "recall", "f1", "yes_ratio")


class POPE(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        """LLaVA's questions with the label of (category, image, question), in the question file's
        order."""
        path = self.require(
            folder, *self.question_files, where="it is in LLaVA's eval.zip"
        )
        where = "from https://github.com/AoiDragon/POPE (output/coco)"
        label_file = self.require(folder, "coco/coco_pope_*.json", where=where)
        labels: dict[tuple[str, str, str], str] = {}
        for file in label_file.parent.glob("coco_pope_*.json"):
            category = file.stem.removeprefix("coco_pope_")
            for row in read_jsonl(file):
                labels[category, row["image"], base.squeeze(row["text"])] = row["label"]
        questions = []
        for row in read_jsonl(path):
            text = row["text"].split("\n")[0]
            questions.append(
                base.Question(
                    id=row["question_id"],
                    text=text,
                    truth=labels[row["category"], row["image"], base.squeeze(text)],
                    image=row["image"],
                    category=row["category"],
                )
            )
        return questions

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        parsed = parse(base.text_of(answer)) if answer else "missing"
        return base.item_of(
            question,
            answer,
            score=int(parsed == question.truth),
            parsed=parsed,
            label=question.truth,
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        pairs: dict[str, list[tuple[str, str]]] = {
            item["category"]: [] for item in items
        }
        for item in items:
            if not item["missing"]:
                pairs[item["category"]].append((item["parsed"], item["label"]))
        categories = {category: numbers(part) for category, part in pairs.items()}
        means = {}
        for name in AVERAGED:
            means[name] = base.mean([values[name] for values in categories.values()])
        return base.flatten(
            {"categories": categories, "average_over_categories": means}
        )

    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """Mean over the categories of F1, percent."""
        values = []
        for item in items:
            predicted = item["parsed"] == "yes"
            actual = item["label"] == "yes" and not item.get("missing")
            values.append((predicted and actual, predicted, actual))
        sums = base.in_columns([item["category"] for item in items], values)

        def value(totals: np.ndarray) -> np.ndarray:
            # F1 = 2 TP / (predicted + actual)
            f1 = base.ratio(
                2 * totals[..., 0::3], totals[..., 1::3] + totals[..., 2::3]
            )
            return 100 * f1.mean(axis=-1)

        return base.Statistic(sums, value)


def parse(text: str) -> str:
    """'yes' or 'no', as the official script reads it."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def numbers(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Numbers of one category from (parsed, label) pairs; what cannot be divided is 0."""
    return {
        "n": len(pairs),
        "accuracy": base.mean([parsed == label for parsed, label in pairs]),
        "yes_ratio": base.mean([parsed == "yes" for parsed, _ in pairs]),
        **base.yes_no_numbers(pairs),
    }


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
    item_fields=("category", "parsed", "label"),
    published=base.published_scores(llava_7b=85.9, llava_13b=85.9),
)
