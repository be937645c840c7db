"""LLaVA-Bench (in the wild) and MM-Vet: open answers that a judge scores.

The judge is a GPT model that this package never calls: ``--reviews`` is the file of the official
program.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import (
    Answer,
    Answers,
    read_answers,
    read_jsonl,
)
from llm2clip_plugin.json_files import read_json_value


def reviewed(member: base.Benchmark, answers: Answers, reviews: Path | None) -> Answers:
    """The judge's reviews of the answers, whose texts go into each row as ``model_answer``; or the
    answers, if these are reviews already. Raises ValueError for another file."""
    if answers.layout == "judge":
        return answers
    if reviews is None or (judged := read_answers(reviews)).layout != "judge":
        raise ValueError(
            f"{member.title} needs a judge: --reviews FILE, "
            f"which {member.judge} makes of {answers.path}"
        )
    texts = {member.answer_key(answer): answer.text or "" for answer in answers.rows}
    rows = []
    for review in judged.rows:
        text = texts.get(member.answer_key(review), "")
        rows.append(replace(review, row={**review.row, "model_answer": text}))
    return replace(judged, rows=tuple(rows))


class LLaVABench(base.Benchmark):
    """A judge gives scores of 1-10 to the reference's and to the model's answer.

    The judge's file is that of LLaVA's ``eval_gpt_review_bench.py``, one JSON line per question
    with ``tuple: [reference, model]``. Score of ``summarize_gpt_review.py``: 100 x mean(model) /
    mean(reference), means rounded to 3 places, the score to 1. A review that cannot be parsed is
    [-1, -1], which the official script averages in.
    """

    def load(self, folder: Path) -> list[base.Question]:
        where = (
            "from https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
        )
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
            raise ValueError(
                f"the review of {question.id} has tuple {marks!r}, expected [reference, model]"
            )
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
        """``<category>``: relative score; ``.reference`` and ``.model``: mean scores x 10, all
        rounded as printed."""
        judged = [item for item in items if not item["missing"]]
        metrics = {}
        for name in ("all", *sorted({item["category"] for item in judged})):
            of_category = [item for item in judged if name in ("all", item["category"])]
            reference = mean_mark(of_category, "mark_reference")
            model = mean_mark(of_category, "mark_model")
            metrics[name] = round(model / reference * 100, 1) if reference else 0.0
            metrics[f"{name}.reference"] = round(reference * 10, 1)
            metrics[f"{name}.model"] = round(model * 10, 1)
        return metrics

    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """100 x sum of the model's scores / sum of the reference's."""
        sums = np.array(
            [[item["mark_model"], item["mark_reference"]] for item in items],
            dtype=float,
        )
        return base.Statistic(
            sums, lambda totals: 100 * base.ratio(totals[..., 0], totals[..., 1])
        )


def mean_mark(items: Sequence[base.Item], field: str) -> float:
    """The mean of a field, rounded as the official script does; 0 without items."""
    return round(float(np.mean([item[field] for item in items])), 3) if items else 0.0


LLAVA_BENCH = LLaVABench(
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
    published=base.published_scores(
        llava_7b=65.4, llava_13b=72.5, reproduced_7b=58.0, llm2clip_7b=62.7
    ),
)


class MMVet(base.Benchmark):
    """Open questions that need some of six capabilities, scored 0 to 1 by a judge, usually five
    times.

    The judge's file is the grade file of MM-Vet's evaluator (``{"v1_0": {"score": [0.5, ...],
    ...}}``, one score per run), whose input LLaVA's ``convert_mmvet_for_eval.py`` makes. Score: 100
    x mean over runs of the mean score, overall and for the questions of each capability, with the
    standard deviation over runs.
    """

    def load(self, folder: Path) -> list[base.Question]:
        path = self.require(
            folder,
            *self.annotations,
            where="from https://github.com/yuweihao/MM-Vet (mm-vet.zip)",
        )
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
            raise ValueError(
                f"{question.id} has no scores in the judge's file; finish the evaluator's run"
            )
        return base.item_of(
            question,
            answer,
            score=base.mean(runs),
            runs=runs,
            answer=answer.row.get("model_answer", "") if answer else "",
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        """Total, capabilities, and the total's standard deviation over the judge's runs,
        percent."""
        graded = [item for item in items if not item["missing"]]
        metrics = {"total": 100 * base.mean_of(graded)}
        for name in sorted({name for item in graded for name in item["capabilities"]}):
            able = [item for item in graded if name in item["capabilities"]]
            metrics[f"capability.{name}"] = 100 * base.mean_of(able)
        runs = min((len(item["runs"]) for item in graded), default=0)
        totals = []
        for run in range(runs):
            totals.append(100 * base.mean([item["runs"][run] for item in graded]))
        metrics["runs"] = float(runs)
        if runs > 1:
            metrics["std_over_runs"] = float(np.std(totals, ddof=1))
        return metrics


MMVET = MMVet(
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
    published=base.published_scores(
        llava_7b=31.1, llava_13b=36.1, reproduced_7b=34.3, llm2clip_7b=34.8
    ),
)
BENCHMARK = [LLAVA_BENCH, MMVET]
