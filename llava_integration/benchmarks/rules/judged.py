"""LLaVA-Bench (in the wild) and MM-Vet: open answers that a GPT model judges, which this package never calls.

``bench-mllm`` writes the answers, the official programs judge them, and ``compare`` reads the marks as a table.
"""

from pathlib import Path

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer


class Judged(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        raise ValueError(f"{self.title} needs a judge: {self.judge} scores the answers")

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        raise NotImplementedError


LLAVA_BENCH = Judged(
    name="llava_bench",
    title="LLaVA-Bench",
    order=11,
    folders=("llava-bench-in-the-wild", "llava_bench"),
    annotations=(),
    question_files=("questions.jsonl",),
    image_folders=("images", ""),
    evaluate_options=base.LONG_ANSWERS,
    judge="LLaVA's eval_gpt_review_bench.py",
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
    published=base.published_scores(llava_7b=31.1, llava_13b=36.1, reproduced_7b=34.3, llm2clip_7b=34.8),
)
BENCHMARK = [LLAVA_BENCH, MMVET]
