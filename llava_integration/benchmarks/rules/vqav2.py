"""VQAv2: ten human answers per question; those of test-dev are known to the server only.

Rule: https://visualqa.org/evaluation.html, on LLaVA's ``convert_vqav2_for_submission.py`` of the answers
(``converted_submission``), through which LLaVA's published numbers went. The converter splits ``'s`` off as a word,
which no human answer has, so possessives score 0 through it; unanimous answers are compared without normalization.
"""

from collections.abc import Sequence
from pathlib import Path

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer, Answers, Row, read_jsonl
from llava_integration.benchmarks.vqa_text import m4c, vqa_api_accuracy, vqa_api_numbers
from llm2clip_plugin.files import read_json_value

VAL_QUESTIONS = ("*OpenEnded*val2014_questions*.json", "*OpenEnded*questions*.json")


class VQAv2(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        annotations = self.require(
            folder,
            "*val2014_annotations*.json",
            "*annotations*.json",
            where="val2014's are at https://visualqa.org/download.html; for test-dev write --submission FILE for the "
            "server https://eval.ai/web/challenges/challenge-page/830",
        )
        path = self.require(folder, *VAL_QUESTIONS, where="https://visualqa.org/download.html")
        truths = {entry["question_id"]: entry for entry in read_json_value(annotations)["annotations"]}
        llavas = base.first_file(folder, *self.question_files)  # it names the pictures
        images = {str(row["question_id"]): str(row.get("image", "")) for row in read_jsonl(llavas)} if llavas else {}
        questions = []
        for entry in read_json_value(path)["questions"]:
            truth = truths[entry["question_id"]]
            questions.append(
                base.Question(
                    id=entry["question_id"],
                    text=entry["question"],
                    cluster=str(entry["image_id"]),
                    truth=[answer["answer"] for answer in truth["answers"]],
                    image=images.get(str(entry["question_id"]), _val_image(entry)),
                    category=truth["answer_type"],
                    extra={"answer_type": truth["answer_type"], "question_type": truth["question_type"]},
                )
            )
        return questions

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """A missing answer is submitted as '' by the converter."""
        text = base.text_of(answer)
        submission = text if answer and answer.layout == "submission" else m4c(text)
        score = vqa_api_accuracy(submission, question.truth)
        return base.item_of(question, answer, score=score, submission=submission)

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        return base.flatten({"converted_submission": vqa_api_numbers(items, "answer_type", "question_type")})

    def question_rows(self, folder: Path) -> list[Row]:
        path = base.first_file(folder, *VAL_QUESTIONS)
        return [
            base.question_row(entry["question_id"], _val_image(entry), f"{entry['question']}\n{base.SHORT_ANSWER}")
            for entry in (read_json_value(path)["questions"] if path else [])
        ]

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """One normalized answer for every question of LLaVA's question file, '' where missing."""
        path = self.require(folder, *self.question_files, where="it is in LLaVA's eval.zip")
        texts = {str(answer.id): answer.text for answer in answers.rows}
        return [
            {"question_id": row["question_id"], "answer": m4c(texts.get(str(row["question_id"])) or "")}
            for row in read_jsonl(path)
        ]


def _val_image(entry: Row) -> str:
    return f"COCO_val2014_{entry['image_id']:012d}.jpg"


BENCHMARK = VQAv2(
    name="vqav2",
    title="VQAv2",
    order=1,
    headline="converted_submission.overall_unrounded",
    folders=("vqav2",),
    annotations=("*annotations*.json", "*OpenEnded*questions*.json"),
    question_files=("llava_vqav2*.jsonl",),
    scored_question_files=("llava_vqav2*val*.jsonl",),
    image_folders=("val2014", "test2015", "images", ""),
    submission_format="json",
    published=base.published_scores(llava_7b=78.5, llava_13b=80.0, reproduced_7b=79.04, llm2clip_7b=79.80),
)
