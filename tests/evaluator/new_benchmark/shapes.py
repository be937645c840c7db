"""Shapes: which shape is in the picture? Exact match in any case; a final full stop is ignored."""

from llava_integration.evaluator.benchmarks.answers import read_jsonl
from llava_integration.evaluator.benchmarks.benchmark import (
    LLAVA_7B,
    Benchmark,
    Question,
    item_of,
    text_of,
)


class Shapes(Benchmark):
    def load(self, folder):
        rows = read_jsonl(
            self.require(
                folder, *self.annotations, where="from https://example.org/shapes"
            )
        )
        return [
            Question(
                id=row["question_id"],
                text=row["text"],
                cluster=row["image"],
                image=row["image"],
                truth=row["shape"],
            )
            for row in rows
        ]

    def score_item(self, question, answer):
        return item_of(
            question,
            answer,
            score=float(text_of(answer).lower().strip(" .") == question.truth),
        )


BENCHMARK = Shapes(
    name="shapes",
    title="Shapes",
    folders=("shapes",),
    annotations=("shapes.jsonl",),
    question_files=("shapes.jsonl",),
    image_folders=("images",),
    evaluate_options=("--max-new-tokens", "8"),
    published={LLAVA_7B: 61.5},
)
