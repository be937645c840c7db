"""GQA, testdev_balanced: exact match, and the breakdowns of its ``eval.py``.

Rule: https://cs.stanford.edu/people/dorarad/gqa/evaluate.html on LLaVA's
``convert_gqa_for_eval.py`` of the answers: final full stops are removed, lower case, nothing else
('red .' becomes 'red '). Validity and plausibility are 0, as the official script gives them without
the choices file.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import Answer, Answers, Row
from llm2clip_plugin.json_files import read_json_value

# operations that ask rather than reason
NOT_A_STEP = (
    "exist",
    "query: name",
    "choose name",
)
BREAKDOWNS = {  # metric -> field of the items
    "per_structural_type": "category",
    "per_semantic_type": "semantic",
    "per_steps": "steps",
    "per_length": "words",
}


class GQA(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        page = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        where = f"questions1.2.zip at {page}, into data/"
        entries = read_json_value(self.require(folder, *self.annotations, where=where))
        questions = []
        for identifier, entry in entries.items():
            if not entry.get("isBalanced", True):
                continue
            questions.append(
                base.Question(
                    id=identifier,
                    text=entry["question"],
                    truth=entry["answer"],
                    image=f"{entry['imageId']}.jpg",
                    cluster=str(entry["imageId"]),
                    category=entry["types"]["structural"],
                    extra={
                        "semantic": entry["types"]["semantic"],
                        "steps": sum(map(is_step, entry["semantic"])),
                        "words": len(entry["question"].split()),
                        "group": entry["groups"]["global"],
                    },
                )
            )
        return questions

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """A missing answer is wrong (the official script rejects the file)."""
        text = base.text_of(answer)
        prediction = text if answer and answer.layout == "submission" else convert(text)
        return base.item_of(
            question,
            answer,
            score=int(answer is not None and prediction == question.truth),
            prediction=prediction,
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        query = [item for item in items if item["category"] == "query"]
        binary = [item for item in items if item["category"] != "query"]
        tree: dict[str, Any] = {
            "accuracy_percent": 100 * base.mean_of(items),
            "binary_percent": 100 * base.mean_of(binary),
            "open_percent": 100 * base.mean_of(query),
            "distribution": chi_square(items) / 100,
            "validity": 0.0,
            "plausibility": 0.0,
        }
        for name, part in BREAKDOWNS.items():
            groups = base.by_group(items, part)
            tree[name] = {
                key: 100 * base.mean(values) for key, values in groups.items()
            }
            tree[f"{name}_count"] = {key: len(values) for key, values in groups.items()}
        return base.flatten(tree)

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        return [
            {"questionId": answer.id, "prediction": convert(answer.text or "")}
            for answer in answers.rows
        ]


def is_step(operation: Row) -> bool:
    """Whether an operation of a question's program reasons."""
    text = f"{operation['operation']}: {operation['argument']}"
    return not any(word in text for word in NOT_A_STEP)


def convert(text: str) -> str:
    """LLaVA's conversion for the evaluation."""
    return text.rstrip(".").lower()


def chi_square(items: Sequence[base.Item]) -> float:
    """Distance of predicted from true answers within each global group, averaged by the group's
    size.

    sum over groups of n_g x sum over true answers a of (predicted_a - true_a)^2 / true_a, over sum
    of n_g.
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if item["group"] is not None:
            true[item["group"]][item["truth"]] += 1
            predicted[item["group"]][item["prediction"]] += 1
    total = weighted = 0.0
    for group, counts in true.items():
        size = sum(counts.values())
        distance = sum(
            (predicted[group][answer] - expected) ** 2 / expected
            for answer, expected in counts.items()
        )
        weighted += distance * size
        total += size
    return weighted / total if total else 0.0


BENCHMARK = GQA(
    name="gqa",
    title="GQA",
    order=2,
    folders=("gqa",),
    annotations=(
        "data/testdev_balanced_questions.json",
        "testdev_balanced_questions.json",
        "data/questions1.2/testdev_balanced_questions.json",
    ),
    question_files=("llava_gqa*.jsonl",),
    image_folders=("data/images", "images", ""),
    submission_format="json",
    published=base.published_scores(
        llava_7b=62.0, llava_13b=63.3, reproduced_7b=62.86, llm2clip_7b=63.15
    ),
)
