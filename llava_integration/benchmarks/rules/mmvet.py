"""MM-Vet: open questions that need some of six capabilities, scored 0 to 1 by a judge, usually five times.

The judge is a GPT model that this package never calls: ``--reviews`` is the grade file of MM-Vet's evaluator
(``{"v1_0": {"score": [0.5, ...], ...}}``, one score per run), whose input LLaVA's ``convert_mmvet_for_eval.py`` makes.
Score: 100 x mean over runs of the mean score, overall and for the questions of each capability, with the standard
deviation over runs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer
from llm2clip_plugin.files import read_json_value


class MMVet(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        path = self.require(folder, *self.annotations, where="from https://github.com/yuweihao/MM-Vet (mm-vet.zip)")
        return [
            base.Question(
                id=identifier,
                text=entry["question"],
                truth=entry["answer"],
                image=entry["imagename"],
                category="+".join(sorted(entry["capability"])),
                extra={"capabilities": list(entry["capability"])},
            )
            for identifier, entry in read_json_value(path).items()
        ]

    def answer_key(self, answer: Answer) -> str:
        """LLaVA's question ids are numbers, MM-Vet's are v1_<number>."""
        return f"v1_{str(answer.id).removeprefix('v1_')}"

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """``answer`` is the judge's grade; the item's score is its mean over runs."""
        runs = [float(mark) for mark in answer.row["score"]] if answer else []
        if answer and not runs:
            raise ValueError(f"{question.id} has no scores in the judge's file; finish the evaluator's run")
        return base.item_of(
            question,
            answer,
            score=base.mean(runs),
            runs=runs,
            answer=answer.row.get("model_answer", "") if answer else "",
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        """Total, capabilities, and the total's standard deviation over the judge's runs, percent."""
        graded = [item for item in items if not item["missing"]]
        metrics = {"total": 100 * base.mean_of(graded)}
        for name in sorted({name for item in graded for name in item["capabilities"]}):
            metrics[f"capability.{name}"] = 100 * base.mean_of(
                [item for item in graded if name in item["capabilities"]]
            )
        runs = min((len(item["runs"]) for item in graded), default=0)
        totals = [100 * base.mean([item["runs"][run] for item in graded]) for run in range(runs)]
        metrics["runs"] = float(runs)
        if runs > 1:
            metrics["std_over_runs"] = float(np.std(totals, ddof=1))
        return metrics


BENCHMARK = MMVet(
    name="mmvet",
    title="MM-Vet",
    order=12,
    headline="total",
    folders=("mm-vet", "mmvet"),
    annotations=("mm-vet.json",),
    question_files=("llava-mm-vet.jsonl",),
    image_folders=("images", ""),
    evaluate_options=base.LONG_ANSWERS,
    judge="MM-Vet's evaluator",
    answered_only=True,
    published=base.published_scores(llava_7b=31.1, llava_13b=36.1, reproduced_7b=34.3, llm2clip_7b=34.8),
)
