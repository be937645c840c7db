"""VizWiz-VQA: ten crowd answers per picture, often 'unanswerable'; val is scored here, test by the server.

Rule: the VQA API's on LLaVA's ``convert_vizwiz_for_submission.py`` of the answers (the challenge's code is a fork of
that API).
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer, Answers, Row, read_jsonl
from llava_integration.benchmarks.vqa_text import m4c, vqa_api_accuracy, vqa_api_numbers
from llm2clip_plugin.files import read_json_value

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        """Questions of val.json, with the ids of LLaVA's question file of val, or else their positions in val.json."""
        annotations = self.require(
            folder,
            "val.json",
            "*val*.json",
            where="val.json is in Annotations.zip at https://vizwiz.org/tasks-and-datasets/vqa; the test split is "
            "scored by the server: write --submission FILE",
        )
        entries = read_json_value(annotations)
        path = base.first_file(folder, *self.scored_question_files)
        ids = {row["image"]: row["question_id"] for row in read_jsonl(path)} if path else {}
        if path and (unknown := [entry["image"] for entry in entries if entry["image"] not in ids]):
            raise ValueError(
                f"{len(unknown)} images of {annotations} ({unknown[0]} ...) are not in {path}; they are of different "
                "splits"
            )
        return [
            base.Question(
                id=ids.get(entry["image"], place),
                text=entry["question"],
                truth=[answer["answer"] for answer in entry["answers"]],
                image=entry["image"],
                category=entry.get("answer_type", ""),
                extra={"answer_type": entry.get("answer_type", "")},
            )
            for place, entry in enumerate(entries)
        ]

    def question_keys(self, question: base.Question) -> tuple[Hashable, ...]:
        """LLaVA's id, and the image's name, which submissions have."""
        return ("id", str(question.id)), ("image", Path(question.image).stem)

    def answer_key(self, answer: Answer) -> Hashable:
        return ("id", str(answer.id)) if answer.layout == "llava" else ("image", Path(str(answer.id)).stem)

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """A missing answer scores 0."""
        submission = m4c(base.text_of(answer))
        score = vqa_api_accuracy(submission, question.truth) if answer else 0.0
        return base.item_of(question, answer, score=score, submission=submission)

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        return base.flatten({"vqa_api": vqa_api_numbers(items, "answer_type")})

    def question_rows(self, folder: Path) -> list[Row]:
        return [
            base.question_row(place, entry["image"], f"{entry['question']}\n{UNANSWERABLE}\n{base.SHORT_ANSWER}")
            for place, entry in enumerate(read_json_value(folder / "val.json"))
        ]

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """The server's file: an answer to every question."""
        where = "LLaVA's questions, in its eval.zip: question_id, image, text"
        rows = read_jsonl(self.require(folder, *self.question_files, where=where))
        texts = base.texts_by_id(answers, [row["question_id"] for row in rows])
        return [{"image": row["image"], "answer": m4c(texts[str(row["question_id"])])} for row in rows]


BENCHMARK = VizWiz(
    name="vizwiz",
    title="VizWiz",
    order=3,
    headline="vqa_api.overall_unrounded",
    folders=("vizwiz",),
    annotations=("val.json",),
    question_files=("llava_val*.jsonl", "llava_test*.jsonl"),
    scored_question_files=("llava_val*.jsonl",),
    image_folders=("val", "test", "images", ""),
    submission_format="json",
    published=base.published_scores(llava_7b=50.0, llava_13b=53.6, reproduced_7b=50.57, llm2clip_7b=52.37),
)
