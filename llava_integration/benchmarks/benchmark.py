"""A benchmark is one file in ``rules/`` with a ``BENCHMARK``, an instance of a subclass of ``Benchmark``.

Each must define ``load`` and ``score_item``; everything else has a default.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_answers
from llava_integration.benchmarks.base import (
    Item,
    Options,
    Question,
    Scored,
    Statistic,
    mean_of,
    mean_statistic,
)
from llava_integration.benchmarks.match import Matched, Places, match, match_log
from llm2clip_plugin.contracts import atomic_file, sha256_file, sha256_text
from llm2clip_plugin.outside.values import errors_about

SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA's suffix
LONG_ANSWERS = ("--max-new-tokens", "1024")  # default of LLaVA's model_vqa*; evaluate's is model_vqa_loader's 128
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Models of the published numbers: LLaVA's model zoo (https://github.com/haotian-liu/LLaVA/blob/main/docs/MODEL_ZOO.md)
# and the LLM2CLIP project page (https://aka.ms/llm2clip). One run each; they enter no test.
LLAVA_7B = "LLaVA-1.5 7B (official)"
LLAVA_13B = "LLaVA-1.5 13B (official)"
LLAVA_7B_REPRODUCED = "LLaVA-1.5 7B (LLM2CLIP's reproduction)"
LLM2CLIP_7B = "LLaVA-1.5 7B + LLM2CLIP (paper)"


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """One benchmark: its files, how LLaVA answers it, its scoring rule, its published numbers."""

    name: str  # on the command line and in score files
    title: str  # in tables
    order: int = 1000  # position in tables; equal ones by name
    headline: str = "accuracy_percent"  # key of the headline number in the metrics
    scale: float = 1.0  # headline number in the published unit = metrics[headline] * scale
    unit: str = "%"  # of the headline number
    folders: tuple[str, ...]  # names of its folder in LLaVA's playground/data/eval
    annotations: tuple[str, ...]  # glob patterns, below the folder, of the files that it is scored with
    question_files: tuple[str, ...]  # glob patterns of LLaVA's question file
    scored_question_files: tuple[str, ...] = ()  # of the split with public annotations, where LLaVA's file is another's
    image_folders: tuple[str, ...] = ("",)  # below the folder, tried in order
    evaluate_options: tuple[str, ...] = ()  # of llava_integration.evaluate, as in LLaVA's scripts/v1_5/eval
    lmms_eval_tasks: tuple[str, ...] = ()  # lmms-eval's task names
    logged_id: tuple[str, ...] = ()  # the id in lmms-eval's logs: field, and the row's entries that may have it
    judge: str = ""  # the program that writes the file for --reviews; "": scored from the answers alone
    submission_format: str = ""  # json | jsonl: what its server accepts; "": no server
    published: Mapping[str, float] = field(default_factory=dict)  # headline number by model
    item_fields: tuple[str, ...] = ()  # what the statistic reads besides score; without them scores are averaged

    @abstractmethod
    def load(self, folder: Path) -> list[Question]:
        """Questions with their truth. Raises FileNotFoundError or ValueError for missing or unusable annotations."""

    @abstractmethod
    def score_item(self, question: Question, answer: Answer | None) -> Item:
        """One question's item (see ``item_of``); ``answer`` is None if the question has none."""

    def metrics(self, items: Sequence[Item]) -> dict[str, float]:
        """All numbers, under the official script's names."""
        return {"accuracy_percent": 100 * mean_of(items)}

    def counts(self, items: Sequence[Item]) -> dict[str, int]:
        """Additional counts, such as answers in which no option is recognized."""
        return {}

    def statistic(self, items: Sequence[Item]) -> Statistic:
        """The headline number as a function of sums over items: mean score, percent."""
        return mean_statistic([item["score"] for item in items])

    # Which answer belongs to which question

    def question_keys(self, question: Question) -> tuple[Hashable, ...]:
        """Keys that its answers are looked up by. Of several questions with one key, the k-th gets the k-th answer."""
        return (str(question.id),)

    def answer_key(self, answer: Answer) -> Hashable | None:
        """The key of the question that a row of LLaVA's answers or of a submission answers; None: unknown."""
        return str(answer.id)  # numbers in one file are often strings in the other

    def logged_key(self, answer: Answer) -> Hashable | None:
        """The key of the question that a row of lmms-eval's log names; None: looked up by doc_id or text."""
        return logged_field(answer, *self.logged_id) if self.logged_id else None

    # Scoring

    def score(self, folder: Path, answers: Answers, options: Options) -> Scored:
        """Score answers with the annotations in ``folder``. Raises ValueError for answers to another benchmark."""
        questions, matched = self.join(folder, answers, options)
        with errors_about(f"the {self.title} files in {folder}", fix="download them again"):
            items = [self.score_item(*pair) for pair in zip(questions, matched.answers, strict=True)]
            counts = {**matched.counts, **self.counts(items)}
            return Scored(metrics=self.metrics(items), items=items, counts=counts, notes=matched.notes)

    def join(self, folder: Path, answers: Answers, options: Options) -> tuple[list[Question], Matched]:
        """The questions, and the answer to each."""
        if self.judge:
            answers = self.read_reviews(answers, options)
        with errors_about(f"the {self.title} files in {folder}", fix="download them again"):
            questions = self.arrange(self.load(folder), answers)
        places = Places([self.question_keys(question) for question in questions])
        if answers.layout == "lmms_eval":
            keyed = [places.next(self.logged_key(answer)) for answer in answers.rows]
            targets = match_log(questions, answers, keyed, allow=options.allow)
        else:
            targets = [places.next(self.answer_key(answer)) for answer in answers.rows]
        return questions, match(questions, answers, targets, allow=options.allow, name=self.name)

    def arrange(self, questions: list[Question], answers: Answers) -> list[Question]:
        """Hook that may choose among or reorder the questions for answers of a layout."""
        return questions

    def read_reviews(self, answers: Answers, options: Options) -> Answers:
        """The judge's reviews in place of the answers, whose texts go into each row as ``model_answer``."""
        if answers.layout == "judge":
            return answers
        if options.reviews is None:
            raise ValueError(
                f"{self.title} needs a judge, but {answers.path} contains answers only; run {self.judge} and pass the "
                "file that it writes as --reviews (or as --answers)"
            )
        reviews = read_answers(options.reviews)
        if reviews.layout != "judge":
            raise ValueError(f"{options.reviews} contains no judge scores; --reviews must be the file of {self.judge}")
        texts = {self.answer_key(answer): answer.text or "" for answer in answers.rows}
        rows = tuple(
            replace(review, row={**review.row, "model_answer": texts.get(self.answer_key(review), "")})
            for review in reviews.rows
        )
        return replace(reviews, rows=rows)

    # Files

    def require(self, folder: Path, *patterns: str, where: str) -> Path:
        """The first file below ``folder`` that matches a pattern; FileNotFoundError says where to get it."""
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; --data must be LLaVA's evaluation folder of {self.name}")
        if (path := first_file(folder, *patterns)) is None:
            raise FileNotFoundError(f"{folder} has no {' or '.join(patterns)}, needed to score {self.name}; {where}")
        return path

    def data_digest(self, folder: Path) -> str:
        """One SHA-256 over the names and contents of the annotation files."""
        paths = sorted({path for pattern in self.annotations for path in folder.glob(pattern) if path.is_file()})
        return sha256_text("".join(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n" for path in paths))

    def question_rows(self, folder: Path) -> list[Row]:
        """Rows of a question file for ``scored_question_files`` that LLaVA does not ship, made from the annotations."""
        return []

    def image_bytes(self, folder: Path, item: Item) -> bytes | None:
        """The encoded picture of an item, or None."""
        path = find_image(self.image_folders, folder, str(item["image"]))
        return path.read_bytes() if path else None

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """Rows of the file that its server scores."""
        raise NotImplementedError(f"{self.name} has no server")

    def write_submission(self, folder: Path, answers: Answers, output: Path) -> None:
        """Write the file that its server scores, atomically."""
        rows = self.submission_rows(folder, answers)
        with atomic_file(output) as path:
            if self.submission_format == "json":
                path.write_text(json.dumps(rows), encoding="utf-8")
            else:
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def published_scores(
    *, llava_7b: float, llava_13b: float, reproduced_7b: float | None = None, llm2clip_7b: float | None = None
) -> dict[str, float]:
    """``published`` of a benchmark: headline numbers by model, without those that nobody reported."""
    numbers = {LLAVA_7B: llava_7b, LLAVA_13B: llava_13b, LLAVA_7B_REPRODUCED: reproduced_7b, LLM2CLIP_7B: llm2clip_7b}
    return {model: number for model, number in numbers.items() if number is not None}


def question_row(identifier: int | str, image: str, prompt: str) -> Row:
    """A row of a question file in LLaVA's format."""
    return {"question_id": identifier, "image": image, "text": prompt, "category": "default"}


def logged_field(answer: Answer, name: str, *entries: str) -> str | None:
    """A field of the first entry of an lmms-eval row that has it, as a string."""
    values = (answer.row.get(entry) for entry in entries)
    return next((str(entry[name]) for entry in values if isinstance(entry, dict) and name in entry), None)


def texts_by_id(answers: Answers, identifiers: Sequence[int | str]) -> dict[str, str]:
    """Texts by id; ValueError if one of ``identifiers`` has none, since the server rejects an incomplete file."""
    texts = {str(answer.id): answer.text for answer in answers.rows if answer.text is not None}
    if missing := [identifier for identifier in identifiers if str(identifier) not in texts]:
        raise ValueError(
            f"{len(missing)} questions have no answer in {answers.path}, first {missing[0]}; the server requires all"
        )
    return texts


def first_file(folder: Path, *patterns: str) -> Path | None:
    """The first file below ``folder`` that matches a pattern, or None."""
    for pattern in patterns:
        if paths := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return paths[0]
    return None


def find_image(image_folders: Sequence[str], folder: Path, name: str) -> Path | None:
    """An image file below ``folder``, with any suffix; None if there is none or ``name`` leads outside."""
    inside = folder.resolve()
    for below in image_folders:
        base = folder / below / name
        for path in (base, *(base.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)):
            if path.is_file() and inside in path.resolve().parents:
                return path
    return None
