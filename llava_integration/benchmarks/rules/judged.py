"""LLaVA-Bench (in the wild) and MM-Vet: open answers that a GPT model judges, which this package never calls.

``bench-mllm`` writes the answers, the official programs judge them, and ``compare`` reads the marks as a table.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer
from llm2clip_plugin.files import ContractError


class Judged(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        table = "; `llm2clip compare` reads its marks as a table with the columns item and score"
        raise ContractError(f"{self.title} needs a judge: {self.judge} scores the answers{table}")

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        raise NotImplementedError


class LLaVABench(Judged):
    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """100 x sum of the model's marks / sum of the reference's, of score files that have them."""
        sums = np.array([[item["mark_model"], item["mark_reference"]] for item in items], dtype=float)
        return base.Statistic(sums, lambda totals: 100 * base.ratio(totals[..., 0], totals[..., 1]))


LLAVA_BENCH = LLaVABench(
    name="llava_bench",
    title="LLaVA-Bench",
    order=11,
    headline="all",
    unit="relative %",
    folders=("llava-bench-in-the-wild", "llava_bench"),
    annotations=(),
    question_files=("questions.jsonl",),
    image_folders=("images", ""),
    evaluate_options=base.LONG_ANSWERS,
    judge="LLaVA's eval_gpt_review_bench.py",
    item_fields=("mark_model", "mark_reference"),
    published=base.published_scores(llava_7b=65.4, llava_13b=72.5, reproduced_7b=58.0, llm2clip_7b=62.7),
)
MMVET = Judged(
    name="mmvet",
    title="MM-Vet",
    order=12,
    folders=("mm-vet", "mmvet"),
    annotations=(),
    question_files=("llava-mm-vet.jsonl",),
    image_folders=("images", ""),
    evaluate_options=base.LONG_ANSWERS,
    judge="MM-Vet's evaluator",
    answered_only=True,
    published=base.published_scores(llava_7b=31.1, llava_13b=36.1, reproduced_7b=34.3, llm2clip_7b=34.8),
)
BENCHMARK = [LLAVA_BENCH, MMVET]
