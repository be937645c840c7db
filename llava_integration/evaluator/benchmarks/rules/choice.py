"""ScienceQA and SEED-Bench: multiple choice, where the letter alone is right."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import Answer, Answers, Row
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.json_files import read_json_value

LETTERS = ("A", "B", "C", "D", "E")
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


class ScienceQA(base.Benchmark):
    """The headline is over the questions with an image (IMG).

    Rule of LLaVA's ``eval_science_qa.py``: the answer is exactly a letter A-E, or begins with 'X.
    ', or has exactly one 'The answer is X' followed by any character. Its IMG part is the questions
    whose *prompt* has ``<image>``, so a missing answer is not in the IMG denominator.
    """

    def load(self, folder: Path) -> list[base.Question]:
        where = "from https://github.com/lupantech/ScienceQA (data/scienceqa)"
        problems, splits = (
            read_json_value(self.require(folder, name, where=where))
            for name in self.annotations
        )
        questions = []
        for identifier in splits["test"]:
            entry = problems[identifier]
            questions.append(
                base.Question(
                    id=identifier,
                    text=entry["question"],
                    cluster=identifier,  # no two questions share a picture
                    truth=LETTERS[entry["answer"]],
                    image=f"{identifier}/{entry['image']}" if entry["image"] else "",
                    category=entry["subject"],
                    extra={"choices": entry["choices"]},
                )
            )
        return questions

    def score(self, folder: Path, answers: Answers, **options: Any) -> ScoreFile:
        """Raises ValueError if the model answered without the images."""
        record = super().score(folder, answers, **options)
        if not any(item["is_multimodal"] for item in record.items):
            advice = "evaluate with LLaVA's question file and --image-folder"
            raise ValueError(
                f"no prompt in {answers.path} has <image>: it answered without the images; {advice}"
            )
        return record

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """``is_multimodal``: in the official IMG part; ``pred_idx``: -1 where no choice is
        recognized."""
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
        failed = [
            item for item in items if item["parsed"] == "FAILED" and not item["missing"]
        ]
        return {"no_letter": len(failed)}

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
            "problems_with_image_in_split": float(
                sum(item["has_image"] for item in items)
            ),
        }

    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """IMG accuracy, percent; over all questions if none has an image."""
        img = [bool(item.get("is_multimodal", True)) for item in items]
        return base.mean_statistic(
            [item["score"] for item in items], img if any(img) else None
        )


def parse(text: str) -> str:
    """The letter that the official script reads, or FAILED."""
    if text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    letters = ANSWER_IS.findall(text)
    return letters[0] if len(letters) == 1 else "FAILED"


SCIENCEQA = ScienceQA(
    name="scienceqa",
    title="ScienceQA-IMG",
    order=4,
    headline="img_accuracy_percent",
    folders=("scienceqa",),
    annotations=("problems.json", "pid_splits.json"),
    question_files=("llava_test_CQM-A.json", "llava_test_*.json"),
    image_folders=("images/test", "images", "test", ""),
    evaluate_options=("--single-pred-prompt", *base.LONG_ANSWERS),
    published=base.published_scores(
        llava_7b=66.8, llava_13b=71.6, reproduced_7b=67.97, llm2clip_7b=69.92
    ),
)


# the official script's
PRINTED = {
    "all": "Total accuracy",
    "image": "image accuracy",
    "video": "video accuracy",
}


class SEEDBench(base.Benchmark):
    """Rule of LLaVA's ``convert_seed_for_submission.py``: ``text == answer`` exactly ('A.', 'a',
    'A. cat' are wrong).

    The headline is over all questions, as in LLaVA's table; image and video are reported too.
    """

    def load(self, folder: Path) -> list[base.Question]:
        where = "from https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
        data = read_json_value(self.require(folder, *self.annotations, where=where))
        names = {number: name for name, number in data["question_type"].items()}
        return [
            _seed_question(entry, names[entry["question_type_id"]])
            for entry in data["questions"]
        ]

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        return base.item_of(
            question, answer, score=int(base.text_of(answer) == question.truth)
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        """The official script's printed percentages, and the same unrounded."""
        types = base.by_group(items, "category")
        printed = base.percents(items, "category")
        metrics = {}
        for part, name in PRINTED.items():
            of_part = [item for item in items if part in ("all", item["data_type"])]
            if of_part:
                accuracy = 100 * base.mean_of(of_part)
                metrics[f"{part}_accuracy_percent"] = accuracy
                printed[name] = round(accuracy, 2)
        counts = {
            name: {"correct": sum(values), "count": len(values)}
            for name, values in types.items()
        }
        return base.flatten(
            {
                **metrics,
                "printed_percent": printed,
                "correct_and_count_per_type": counts,
            }
        )

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """The leaderboard's file, in the annotations' order."""
        ids = [question.id for question in self.load(folder)]
        texts = base.texts_by_id(answers, ids)
        return [{"question_id": name, "prediction": texts[str(name)]} for name in ids]


def _seed_question(entry: Row, category: str) -> base.Question:
    media = _media(entry)
    kind = entry["data_type"]
    letters = [letter for letter in "abcd" if f"choice_{letter}" in entry]
    return base.Question(
        id=entry["question_id"],
        text=entry["question"],
        cluster=media,
        truth=entry["answer"],
        image=f"SEED-Bench-image/{media}" if kind == "image" else "",
        category=category,
        extra={
            "question_type_id": entry["question_type_id"],
            "data_type": kind,
            "choices": [entry[f"choice_{letter}"] for letter in letters],
        },
    )


def _media(entry: Row) -> str:
    media = entry["data_id"]
    return str(media[0] if isinstance(media, list) else media)


SEEDBENCH = SEEDBench(
    name="seedbench",
    title="SEED-Bench",
    order=10,
    headline="all_accuracy_percent",
    folders=("seed_bench", "seedbench", "seed-bench"),
    annotations=("SEED-Bench.json",),
    question_files=("llava-seed-bench.jsonl", "llava-seed-bench*.jsonl"),
    submission_format="jsonl",
    published=base.published_scores(llava_7b=58.6, llava_13b=61.6),
)


BENCHMARK = [SCIENCEQA, SEEDBENCH]
