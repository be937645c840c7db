"""LLaVA-Bench (in the wild): a judge gives scores of 1-10 to the reference's and to the model's answer.

The judge is a GPT model that this package never calls: ``--reviews`` is the file of LLaVA's
``eval_gpt_review_bench.py``, one JSON line per question with ``tuple: [reference, model]``. Score of
``summarize_gpt_review.py``: 100 x mean(model) / mean(reference), means rounded to 3 places, the score to 1. A review
that cannot be parsed is [-1, -1], which the official script averages in.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer, read_jsonl


class LLaVABench(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        where = "from https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
        return [
            base.Question(
                id=row["question_id"],
                text=row["text"],
                truth="",
                image=row["image"],
                category=row.get("category", ""),
            )
            for row in read_jsonl(self.require(folder, *self.annotations, where=where))
        ]

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """``answer`` is the review; the model's score out of 10 is the item's."""
        row = answer.row if answer else {}
        marks = row.get("tuple", [0.0, 0.0])
        if not isinstance(marks, list) or len(marks) != 2:
            raise ValueError(f"the review of {question.id} has tuple {marks!r}, expected [reference, model]")
        reference, model = map(float, marks)
        return base.item_of(
            question,
            answer,
            score=model / 10,
            mark_reference=reference,
            mark_model=model,
            failed=answer is not None and (reference < 0 or model < 0),
            answer=row.get("model_answer", ""),
            review=base.text_of(answer),
            category=str(row.get("category", question.category)),
        )

    def counts(self, items: Sequence[base.Item]) -> dict[str, int]:
        """Reviews without scores, which the official script averages in as -1."""
        return {"failed_reviews": sum(item["failed"] for item in items)}

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        """``<category>``: relative score; ``.reference`` and ``.model``: mean scores x 10, all rounded as printed."""
        given = [item for item in items if not item["missing"]]
        metrics = {}
        for name in ("all", *sorted({item["category"] for item in given})):
            chosen = [item for item in given if name in ("all", item["category"])]
            reference, model = (
                round(float(np.mean([item[field] for item in chosen])), 3) if chosen else 0.0
                for field in ("mark_reference", "mark_model")
            )
            metrics[name] = round(model / reference * 100, 1) if reference else 0.0
            metrics[f"{name}.reference"] = round(reference * 10, 1)
            metrics[f"{name}.model"] = round(model * 10, 1)
        return metrics

    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """100 x sum of the model's scores / sum of the reference's."""
        sums = np.array([[item["mark_model"], item["mark_reference"]] for item in items], dtype=float)
        return base.Statistic(sums, lambda totals: 100 * base.ratio(totals[..., 0], totals[..., 1]))


BENCHMARK = LLaVABench(
    name="llava_bench",
    title="LLaVA-Bench",
    order=11,
    headline="all",
    unit="relative %",
    folders=("llava-bench-in-the-wild", "llava_bench"),
    annotations=("questions.jsonl",),
    question_files=("questions.jsonl",),
    image_folders=("images", ""),
    evaluate_options=base.LONG_ANSWERS,
    judge="LLaVA's eval_gpt_review_bench.py",
    item_fields=("mark_model", "mark_reference"),
    published=base.published_scores(llava_7b=65.4, llava_13b=72.5, reproduced_7b=58.0, llm2clip_7b=62.7),
)
