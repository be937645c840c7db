"""SEED-Bench: four options, image and video questions by type; nothing but the letter is right.

Rule of LLaVA's ``convert_seed_for_submission.py``: ``text == answer`` exactly ('A.', 'a' and 'A. cat' are wrong). The
headline is the accuracy over all questions, as in LLaVA's table; image and video are reported too. An unanswered
question is wrong.
"""

from collections.abc import Sequence
from pathlib import Path

from llava_integration.benchmarks import benchmark as base
from llava_integration.benchmarks.answers import Answer, Answers, Row
from llm2clip_plugin.files import read_json_value

PRINTED = {"all": "Total accuracy", "image": "image accuracy", "video": "video accuracy"}  # the official script's


class SEEDBench(base.Benchmark):
    def _annotations(self, folder: Path) -> dict:
        where = "from https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
        return read_json_value(self.require(folder, *self.annotations, where=where))

    def load(self, folder: Path) -> list[base.Question]:
        data = self._annotations(folder)
        names = {number: name for name, number in data["question_type"].items()}
        return [
            base.Question(
                id=entry["question_id"],
                text=entry["question"],
                cluster=_media(entry),
                truth=entry["answer"],
                image=f"SEED-Bench-{entry['data_type']}/{_media(entry)}" if entry["data_type"] == "image" else "",
                category=names[entry["question_type_id"]],
                extra={
                    "question_type_id": entry["question_type_id"],
                    "data_type": entry["data_type"],
                    "choices": [entry[f"choice_{letter}"] for letter in "abcd" if f"choice_{letter}" in entry],
                },
            )
            for entry in data["questions"]
        ]

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        return base.item_of(question, answer, score=int(base.text_of(answer) == question.truth))

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        """The official script's printed percentages, and the same unrounded."""
        types = base.by_group(items, "category")
        printed = base.percents(items, "category")
        metrics = {}
        for part, name in PRINTED.items():
            if chosen := [item for item in items if part in ("all", item["data_type"])]:
                metrics[f"{part}_accuracy_percent"] = 100 * base.mean_of(chosen)
                printed[name] = round(metrics[f"{part}_accuracy_percent"], 2)
        counts = {name: {"correct": sum(values), "count": len(values)} for name, values in types.items()}
        return base.flatten({**metrics, "printed_percent": printed, "correct_and_count_per_type": counts})

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """The leaderboard's file: one ``{question_id, prediction}`` per line, in the annotations' order."""
        identifiers = [entry["question_id"] for entry in self._annotations(folder)["questions"]]
        texts = base.texts_by_id(answers, identifiers)
        return [{"question_id": name, "prediction": texts[str(name)]} for name in identifiers]


def _media(entry: Row) -> str:
    media = entry["data_id"]
    return str(media[0] if isinstance(media, list) else media)


BENCHMARK = SEEDBench(
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
