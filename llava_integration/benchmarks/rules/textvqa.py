"""TextVQA, val 0.5.1: ten human answers, compared with the M4C evaluator as in LLaVA's ``eval_textvqa.py``.

LLaVA's answers have the image's id, so they are joined by it and by the question in their *prompt*. Annotations with
the same image and question are one for the official script, the last; unanswered questions cost nothing, since it
divides by the number of answers.
"""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer
from llava_integration.benchmarks.vqa_text import m4c, m4c_accuracy
from llm2clip_plugin.files import read_json_value

TOKENS_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class TextVQA(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        path = self.require(
            folder,
            "TextVQA_0.5.1_val.json",
            "TextVQA*val*.json",
            where="https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
        )
        entries = read_json_value(path)["data"]
        last = {(entry["image_id"], entry["question"].lower()): entry for entry in entries}
        return [
            base.Question(
                id=entry["question_id"],
                text=entry["question"],
                cluster=entry["image_id"],
                truth=entry["answers"],
                image=f"{entry['image_id']}.jpg",
                category=(entry.get("image_classes") or [""])[0],
                rule=last[entry["image_id"], entry["question"].lower()],
            )
            for entry in entries
        ]

    def question_keys(self, question: base.Question) -> tuple[Hashable, ...]:
        return str(question.id), (question.cluster, question.text.lower())

    def answer_key(self, answer: Answer) -> Hashable | None:
        """Image and question; the annotation's id for a submission."""
        if not answer.prompt:
            return str(answer.id)
        text = question_in(answer.prompt)
        return None if text is None else (str(answer.id), text)

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """``line``: the answer's line in the file, from 0; -1 for none."""
        text, official = base.text_of(answer), question.rule
        return base.item_of(
            question,
            answer,
            score=m4c_accuracy(text, official["answers"]) if answer else 0.0,
            line=answer.line - 1 if answer else -1,
            question_id=question.cluster,  # LLaVA's question_id is the image's
            annotation_question_id=official["question_id"],
            normalized=m4c(text),
            truth=official["answers"],
        )

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        given = [item for item in items if not item["missing"]]
        return {
            "samples": float(len(given)),
            "accuracy_percent": 100 * base.mean_of(given),
            "accuracy_printed": round(100 * base.mean_of(given), 2),
        }


def question_in(prompt: str) -> str | None:
    """The question in one of LLaVA's four prompt forms, lower case; None in any other."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        question = TOKENS_FIRST.search(prompt)
        return question[1].lower() if question else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


BENCHMARK = TextVQA(
    name="textvqa",
    title="TextVQA",
    order=5,
    folders=("textvqa",),
    annotations=("TextVQA*val*.json",),
    question_files=("llava_textvqa*.jsonl",),
    image_folders=("train_images", "train_val_images/train_images", "images", ""),
    answered_only=True,
    published=base.published_scores(llava_7b=58.2, llava_13b=61.3, reproduced_7b=57.48, llm2clip_7b=58.35),
)
