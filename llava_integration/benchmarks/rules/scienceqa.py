"""ScienceQA: multiple choice; the headline is over the questions with an image (IMG).

Rule of LLaVA's ``eval_science_qa.py``: the answer is exactly a letter A-E, or begins with 'X. ', or has exactly one
'The answer is X' followed by any character. Its IMG part is the questions whose *prompt* has ``<image>``, so a missing
answer is not in the IMG denominator.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer, Answers
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import read_json_value

LETTERS = ("A", "B", "C", "D", "E")
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


class ScienceQA(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        where = "from https://github.com/lupantech/ScienceQA (data/scienceqa)"
        problems, splits = (read_json_value(self.require(folder, name, where=where)) for name in self.annotations)
        return [
            base.Question(
                id=identifier,
                text=problems[identifier]["question"],
                cluster=identifier,  # no two questions share a picture
                truth=LETTERS[problems[identifier]["answer"]],
                image=f"{identifier}/{problems[identifier]['image']}" if problems[identifier]["image"] else "",
                category=problems[identifier]["subject"],
                extra={"choices": problems[identifier]["choices"]},
            )
            for identifier in splits["test"]
        ]

    def score(self, folder: Path, answers: Answers, **options: Any) -> ScoreFile:
        """Raises ValueError if the model answered without the images."""
        record = super().score(folder, answers, **options)
        if not any(item["is_multimodal"] for item in record.items):
            raise ValueError(
                f"no prompt in {answers.path} has <image>: the model answered without the images, which "
                "ScienceQA-IMG is about; evaluate with LLaVA's question file and --image-folder"
            )
        return record

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """``is_multimodal``: in the official IMG part; ``pred_idx``: -1 where no choice is recognized."""
        text = answer.text or "" if answer else "FAILED"
        letter = parse(text)
        choices = question.extra["choices"]
        index = LETTERS.index(letter) if letter in LETTERS[: len(choices)] else -1
        return base.item_of(
            question,
            answer,
            score=int(index == LETTERS.index(question.truth)),
            parsed=letter,
            pred_idx=index,
            is_multimodal=bool(answer and "<image>" in answer.prompt),
            has_image=bool(question.image),
            ground_truth=question.truth,
        )

    def counts(self, items: Sequence[base.Item]) -> dict[str, int]:
        """Answers without a letter."""
        return {"no_letter": sum(item["parsed"] == "FAILED" and not item["missing"] for item in items)}

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        img = [item for item in items if item["is_multimodal"]]
        return {
            "total": float(len(items)),
            "correct": float(sum(item["score"] for item in items)),
            "accuracy_percent": 100 * base.mean_of(items),
            "img_total": float(len(img)),
            "img_correct": float(sum(item["score"] for item in img)),
            "img_accuracy_percent": 100 * base.mean_of(img),
            "img_accuracy_printed": round(100 * base.mean_of(img), 2),
            "problems_with_image_in_split": float(sum(item["has_image"] for item in items)),
        }

    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """IMG accuracy, percent; over all questions if none has an image."""
        img = [bool(item.get("is_multimodal", True)) for item in items]
        return base.mean_statistic([item["score"] for item in items], img if any(img) else None)


def parse(text: str) -> str:
    """The letter that the official script reads, or FAILED."""
    if text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    letters = ANSWER_IS.findall(text)
    return letters[0] if len(letters) == 1 else "FAILED"


BENCHMARK = ScienceQA(
    name="scienceqa",
    title="ScienceQA-IMG",
    order=4,
    headline="img_accuracy_percent",
    folders=("scienceqa",),
    annotations=("problems.json", "pid_splits.json"),
    question_files=("llava_test_CQM-A.json", "llava_test_*.json"),
    image_folders=("images/test", "images", "test", ""),
    evaluate_options=("--single-pred-prompt", *base.LONG_ANSWERS),
    published=base.published_scores(llava_7b=66.8, llava_13b=71.6, reproduced_7b=67.97, llm2clip_7b=69.92),
)
