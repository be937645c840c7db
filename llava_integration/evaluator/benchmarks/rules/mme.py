"""MME: two yes/no questions per image, 14 subtasks; a subtask scores 100 x accuracy + 100 x
accuracy of complete pairs.

Rule of its ``eval_tool/calculation.py`` after LLaVA's ``convert_answer_to_mme.py``: the first four
characters of the lower-cased answer decide: 'yes' in them, else 'no' in them, else other, which is
wrong ('Not sure' and 'Snow' are no, 'Y' is other). The official tool takes two consecutive lines
for an image; here a pair is the two questions of an image file, in any order. Perception sums ten
subtasks (2000), cognition four (800).
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from llava_integration.evaluator.benchmarks import benchmark as base
from llava_integration.evaluator.benchmarks.answers import Answer, read_jsonl, read_text

RELEASE = "MME_Benchmark_release_version"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
SUFFIXES = (
    "answer the question using a single word or phrase.",
    "please answer yes or no.",
)


class MME(base.Benchmark):
    def load(self, folder: Path) -> list[base.Question]:
        """The questions of all subtasks there, two per file."""
        root = folder / RELEASE
        if not root.is_dir():
            where = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
            raise FileNotFoundError(
                f"{folder} has no {RELEASE}; request it as described at {where}"
            )
        llavas = base.first_file(folder, *self.question_files)  # it names the pictures
        rows = read_jsonl(llavas) if llavas else []
        images = {
            (row["category"], Path(row["image"]).stem): row["image"] for row in rows
        }
        questions = []
        for category in (*PERCEPTION, *COGNITION):
            inner = root / category / "questions_answers_YN"
            for path in sorted(
                (inner if inner.is_dir() else root / category).glob("*.txt")
            ):
                questions += _pair(path, category, images)
        if not questions:
            raise FileNotFoundError(
                f"{root} has none of MME's subtasks ({', '.join(PERCEPTION)} ...)"
            )
        return questions

    def question_keys(self, question: base.Question) -> tuple[Hashable, ...]:
        return ((question.cluster, question.text),)

    def answer_key(self, answer: Answer) -> Hashable | None:
        """LLaVA's id is the image's path."""
        return _key(answer.id, answer.prompt)

    def score_item(self, question: base.Question, answer: Answer | None) -> base.Item:
        """A missing answer is 'other', so wrong."""
        text = base.text_of(answer)
        return base.item_of(
            question,
            answer,
            score=int(parse(text) == question.truth),
            question_id=question.image,
            gt=question.truth,
            parsed=parse(text),
        )

    def counts(self, items: Sequence[base.Item]) -> dict[str, int]:
        return {
            "other": sum(
                item["parsed"] == "other" and not item["missing"] for item in items
            )
        }

    def metrics(self, items: Sequence[base.Item]) -> dict[str, float]:
        categories = {}
        for name in (*PERCEPTION, *COGNITION):
            of_subtask = [item for item in items if item["category"] == name]
            if of_subtask:
                categories[name] = subtask(of_subtask)
        scores = {name: numbers["score"] for name, numbers in categories.items()}
        perception = sum(scores[name] for name in PERCEPTION if name in scores)
        cognition = sum(scores[name] for name in COGNITION if name in scores)
        sums = {
            "perception": perception,
            "cognition": cognition,
            "total": perception + cognition,
        }
        return base.flatten({"categories": categories, **sums})

    def statistic(self, items: Sequence[base.Item]) -> base.Statistic:
        """Perception, of 2000, which LLaVA's table calls MME."""
        return paired_accuracy(items, PERCEPTION)


def paired_accuracy(
    items: Sequence[base.Item], categories: Sequence[str]
) -> base.Statistic:
    """Sum over subtasks of 100 x right / questions + 100 x complete pairs / images, resampled
    within a subtask."""
    parts = [item["category"] for item in items]
    complete = complete_pairs(items)
    values = []
    counted_images = set()
    for item in items:
        image = item["cluster"]
        counts = image not in counted_images  # a pair counts at its first question
        counted_images.add(image)
        values.append((item["score"], 1, complete[image] and counts, counts))
    sums = base.in_columns(parts, values, categories)

    def value(totals: np.ndarray) -> np.ndarray:
        accuracy = base.ratio(totals[..., 0::4], totals[..., 1::4])
        accuracy_plus = base.ratio(totals[..., 2::4], totals[..., 3::4])
        return 100 * (accuracy + accuracy_plus).sum(axis=-1)

    _, strata = np.unique(parts, return_inverse=True)
    return base.Statistic(
        sums, value, strata=strata, counted=sums[:, 1::4].sum(axis=1) > 0
    )


def plain(question: str) -> str:
    """A question without LLaVA's and MME's suffixes, squeezed."""
    text = base.squeeze(question)
    for suffix in SUFFIXES:
        text = text.replace(suffix, "")
    return text.strip()


def _pair(
    path: Path, category: str, images: dict[tuple[str, str], str]
) -> list[base.Question]:
    """The questions of one image's file: one ``question<TAB>Yes|No`` per line."""
    questions = []
    for nth, line in enumerate(
        line for line in read_text(path).split("\n") if line.strip()
    ):
        fields = line.strip().split("\t")
        if len(fields) != 2 or fields[1].lower() not in ("yes", "no"):
            raise ValueError(
                f"{path}, line {nth + 1}: expected 'question<TAB>Yes' or No, got {line!r}"
            )
        questions.append(
            base.Question(
                id=f"{category}/{path.stem}/{nth}",
                text=plain(fields[0]),
                cluster=f"{category}/{path.stem}",
                truth=fields[1].lower(),
                image=images.get((category, path.stem), f"{category}/{path.stem}.jpg"),
                category=category,
                extra={"file": path.name, "nth": nth},
            )
        )
    return questions


def _key(identifier: object, prompt: str) -> tuple[str, str] | None:
    """(subtask/stem, question) from an image's path and a prompt."""
    name = str(identifier)
    if "/" not in name:
        return None
    # the official converter cuts the file name at its first full stop
    return f"{name.split('/')[0]}/{name.split('/')[-1].split('.')[0]}", plain(prompt)


def parse(text: str) -> str:
    """'yes', 'no' or 'other', as the official tool reads it."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def complete_pairs(items: Sequence[base.Item]) -> dict[str, bool]:
    """Whether all questions of an image are right, by image."""
    complete: dict[str, bool] = {}
    for item in items:
        complete[item["cluster"]] = complete.get(item["cluster"], True) and bool(
            item["score"]
        )
    return complete


def subtask(items: Sequence[base.Item]) -> dict[str, float]:
    """One subtask: confusion counts, accuracy, accuracy of complete pairs, score; 'other' is in no
    confusion count."""
    counts = base.yes_no_numbers([(item["parsed"], item["gt"]) for item in items])
    accuracy = base.mean_of(items)
    accuracy_plus = base.mean(list(complete_pairs(items).values()))
    return {
        **{name: value for name, value in counts.items() if name != "f1"},
        "other_num": sum(item["parsed"] == "other" for item in items),
        "acc": accuracy,
        "acc_plus": accuracy_plus,
        "score": accuracy * 100 + accuracy_plus * 100,
    }


BENCHMARK = MME(
    name="mme",
    title="MME perception",
    order=7,
    headline="perception",
    unit="points",
    folders=("MME", "mme"),
    annotations=(f"{RELEASE}/**/*.txt",),
    question_files=("llava_mme.jsonl", "llava_mme*.jsonl"),
    image_folders=(RELEASE, ""),
    item_fields=("category", "cluster"),
    published=base.published_scores(
        llava_7b=1510.7, llava_13b=1531.3, reproduced_7b=1476.69, llm2clip_7b=1505.82
    ),
)
