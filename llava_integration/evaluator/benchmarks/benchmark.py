"""A benchmark is one file in ``rules/`` with a ``BENCHMARK``, an instance of a subclass of
``Benchmark``.

Each must define ``load`` and ``score_item``; everything else has a default. A question is one line
of a benchmark's annotations; an item is what a score file says about one question.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_integration.evaluator.benchmarks.answers import Answer, Answers, Row
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.hashes import sha256_file, sha256_text

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark, from its annotation files."""

    id: int | str  # the item's id in the score file, typed as in the annotations
    text: str  # without the suffix that LLaVA appends
    truth: Any  # label, letter, or list of human answers
    image: str = ""  # path below one of the benchmark's image folders
    # questions about one image are resampled together; "": those with the same ``image``
    cluster: str = ""
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # more fields of the item
    rule: Any = None  # what only the scoring rule reads


@dataclass(frozen=True)
class Statistic:
    """A headline number as a function of sums over questions. Shapes: N questions, K sums.

    A resample is a weight for each question, its totals are ``weight_N @ sums_NK``, and ``value``
    maps totals (..., K) to numbers (...) in the published unit.
    """

    sums: np.ndarray  # (N, K)
    value: Callable[[np.ndarray], np.ndarray]
    # (N,) integers: images are drawn within their part, whose size is fixed; parts weigh the same
    strata: np.ndarray | None = None
    # (N,) booleans: the questions that the number is about; None: all
    counted: np.ndarray | None = None

    def full(self) -> float:
        """The number on all questions, each once."""
        return float(self.value(self.sums.sum(axis=0)))


def text_of(answer: Answer | None) -> str:
    """The answer's text; "" for a missing answer."""
    return answer.text or "" if answer else ""


def item_of(question: Question, answer: Answer | None, /, **fields: Any) -> Item:
    """An item: what every benchmark records about a question, ``fields`` (``score`` at least) and
    its ``extra``."""
    return {
        "id": question.id,
        "cluster": question.cluster or question.image,
        "answer": text_of(answer),
        "missing": answer is None,
        "truth": question.truth,
        "question": question.text,
        "category": question.category,
        "image": question.image,
        **fields,
        **question.extra,
    }


def mean(values: Sequence[float]) -> float:
    """Plain mean, added in the order given as the official scripts do; 0.0 for no values."""
    return float(sum(values)) / len(values) if values else 0.0


def mean_of(items: Sequence[Item]) -> float:
    """Mean score of items."""
    return mean([item["score"] for item in items])


def by_group(items: Sequence[Item], group: str) -> dict[str, list[float]]:
    """Scores, listed by another field, groups in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(str(item[group]), []).append(float(item["score"]))
    return groups


def percents(items: Sequence[Item], group: str) -> dict[str, float]:
    """Mean score in each group, percent, rounded to 2 places as the official scripts print it."""
    return {
        key: round(100 * mean(values), 2)
        for key, values in by_group(items, group).items()
    }


def yes_no_numbers(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Counts of (answer, truth), and precision, recall and F1 of "yes"; 0 where the divisor is
    0."""
    counts = Counter(pairs)
    true_yes = counts["yes", "yes"]
    false_yes = counts["yes", "no"]
    false_no = counts["no", "yes"]
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    f1 = 0.0
    if precision + recall:
        f1 = 2 * precision * recall / (precision + recall)
    return {
        "TP": true_yes,
        "FP": false_yes,
        "TN": counts["no", "no"],
        "FN": false_no,
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested dictionaries under dotted names: ``{"a": {"b": 1}}`` becomes ``{"a.b":
    1.0}``."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = float(value)
    return flat


def mean_statistic(
    values: Sequence[float], counted: Sequence[bool] | None = None, scale: float = 100.0
) -> Statistic:
    """The statistic ``scale x mean`` over the questions that count."""
    weight = (
        np.ones(len(values)) if counted is None else np.asarray(counted, dtype=float)
    )
    sums = np.stack([np.asarray(values, dtype=float) * weight, weight], axis=1)
    return Statistic(
        sums,
        lambda totals: scale * ratio(totals[..., 0], totals[..., 1]),
        counted=weight > 0,
    )


def in_columns(
    parts: Sequence[str], values: Sequence[Sequence[float]], names: Sequence[str] = ()
) -> np.ndarray:
    """Sums of a composite of parts: K values for each question, in the K columns of its part, 0 in
    the others'. ``names``: the parts in order, others have no columns; by default all, sorted."""
    column = {name: number for number, name in enumerate(names or sorted(set(parts)))}
    sums = np.zeros((len(parts), len(column), len(values[0])))
    for row, (part, row_values) in enumerate(zip(parts, values, strict=True)):
        if part in column:
            sums[row, column[part]] = row_values
    return sums.reshape(len(parts), -1)


def mean_of_parts(
    parts: Sequence[str], scores: Sequence[float], scale: float
) -> Statistic:
    """The statistic ``scale x mean over parts of the part's mean score``."""
    sums = in_columns(parts, [(score, 1) for score in scores])
    _, strata = np.unique(parts, return_inverse=True)
    return Statistic(
        sums,
        lambda totals: (
            scale * ratio(totals[..., 0::2], totals[..., 1::2]).mean(axis=-1)
        ),
        strata=strata,
    )


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient, 0 where the divisor is 0."""
    above = np.asarray(above, dtype=float)
    below = np.asarray(below, dtype=float)
    return np.divide(
        above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0
    )


# Answers are joined to questions by key, never by order. Of two answers to a question the last
# counts, as in LLaVA's own conversion scripts.


def squeeze(text: str) -> str:
    """Lower case, each run of white space as one space: how questions are compared."""
    return " ".join(text.lower().split())


def places(
    keys: Sequence[Sequence[Hashable]], wanted: Iterable[Hashable | None]
) -> list[int | None]:
    """The place of the question that each wanted key belongs to, None for an unknown one; ``keys``:
    of each question. Of several questions with one key, the k-th answer is the k-th's, later ones
    the last's."""
    questions_of: dict[Hashable, list[int]] = {}
    for question, question_keys in enumerate(keys):
        for key in question_keys:
            questions_of.setdefault(key, []).append(question)
    seen: Counter[Hashable] = Counter()
    targets: list[int | None] = []
    for key in wanted:
        seen[key] += 1
        questions = questions_of.get(key)
        targets.append(
            questions[min(seen[key], len(questions)) - 1] if questions else None
        )
    return targets


@dataclass
class Joined:
    """The answer to each question or None, and what fits no question or holds no answer."""

    answers: list[Answer | None]
    unknown: list[Answer]  # match no question
    doubled: int = 0  # that another one to the question replaces
    textless: int = 0


class Fault(NamedTuple):
    """What is wrong with some of the answers."""

    count: int
    problem: str  # after the count
    total: int | None = None  # of which a share at most may be; None: any number may


def match(
    questions: Sequence[Question],
    answers: Answers,
    targets: Sequence[int | None],
    *,
    allow: float,
    name: str,
) -> tuple[list[Answer | None], dict[str, int], list[str]]:
    """The answer to each question or None, counts, notes on faults; ``targets``: the place of each
    row's question. ValueError for another benchmark's, or if more than the fraction ``allow`` is
    missing, duplicate or unreadable."""
    joined = _join(len(questions), answers, targets)
    answered = [
        (question, answer)
        for question, answer in zip(questions, joined.answers, strict=True)
        if answer is not None
    ]
    if not answered or len(joined.unknown) > max(allow * len(answers.rows), 1):
        example = joined.unknown[0] if joined.unknown else answers.rows[0]
        raise ValueError(
            f"{len(joined.unknown)} of {len(answers.rows)} answers in {answers.path} match no "
            f"question of {name} (line {example.line}: id {example.id!r}, "
            f"prompt {example.prompt[:80]!r}; first question: id {questions[0].id!r}). "
            "Check BENCHMARK, --data and --answers; for a subset pass --allow-missing"
        )
    _refuse_other_prompts(answered, answers.path, name)
    faults = _faults(joined, answers, [answer for _, answer in answered], name)
    for fault in faults.values():
        if fault.total is not None and fault.count > allow * fault.total:
            raise ValueError(
                f"{answers.path}: {fault.count} {fault.problem}, more than the allowed "
                f"{allow:.0%}. Finish the evaluation, or pass --allow-missing"
            )
    counts = {"questions": len(questions), "answered": len(answered)}
    notes = []
    for kind, fault in faults.items():
        counts[kind] = fault.count
        if fault.count:
            notes.append(f"{fault.count} {fault.problem}")
    return joined.answers, counts, notes


def _join(questions: int, answers: Answers, targets: Sequence[int | None]) -> Joined:
    """The last answer with a text to each question."""
    joined = Joined([None] * questions, [])
    for answer, target in zip(answers.rows, targets, strict=True):
        if target is None:
            joined.unknown.append(answer)
        elif answer.text is None:
            joined.textless += 1
        else:
            if joined.answers[target] is not None:
                joined.doubled += 1
            joined.answers[target] = answer
    return joined


def _faults(
    joined: Joined, answers: Answers, answered: Sequence[Answer], name: str
) -> dict[str, Fault]:
    """Kind of fault -> how many there are. ``answered``: the answers that count."""
    total = len(joined.answers)
    missing = total - len(answered)
    lines = len(answers.rows) + len(answers.broken)
    unparsable = len(answers.broken) + joined.textless
    first = f", first at {answers.broken[0]}" if answers.broken else ""
    empty = [answer for answer in answered if not (answer.text or "").strip()]
    return {
        "missing": Fault(
            missing, f"of {total} questions of {name} have no answer", total
        ),
        "doubled": Fault(
            joined.doubled,
            "duplicate answers; the last one to a question counts",
            total,
        ),
        "foreign": Fault(len(joined.unknown), "answers match no question; ignored"),
        "unparsable": Fault(unparsable, f"lines have no answer{first}", lines),
        "empty": Fault(len(empty), "answers are empty"),
    }


def _refuse_other_prompts(
    answered: Sequence[tuple[Question, Answer]], path: Path, name: str
) -> None:
    """ValueError if the ids are this benchmark's, but the prompts ask other questions."""
    prompted = [(question, answer) for question, answer in answered if answer.prompt]
    wrong = [
        (question, answer)
        for question, answer in prompted
        if squeeze(question.text) not in squeeze(answer.prompt)
    ]
    if len(wrong) > 0.5 * len(prompted):
        question, answer = wrong[0]
        both = (
            f"line {answer.line} asks {answer.prompt[:80]!r}, "
            f"question {question.id!r} is {question.text[:80]!r}"
        )
        raise ValueError(
            f"{path} has ids of {name}, but other questions: {both}. Check BENCHMARK and --data"
        )


# of the answers may be missing, duplicate, unreadable or unknown: less than one chunk of 8
ALLOWED = 0.10
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA's suffix
# default of LLaVA's model_vqa*; evaluate's is model_vqa_loader's 128
LONG_ANSWERS = ("--max-new-tokens", "1024")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Models of the published numbers: LLaVA's model zoo
# (https://github.com/haotian-liu/LLaVA/blob/main/docs/MODEL_ZOO.md) and the LLM2CLIP project page
# (https://aka.ms/llm2clip). One run each; they enter no test.
LLAVA_7B = "LLaVA-1.5 7B (official)"
MODELS = {
    "llava_7b": LLAVA_7B,
    "llava_13b": "LLaVA-1.5 13B (official)",
    "reproduced_7b": "LLaVA-1.5 7B (LLM2CLIP's reproduction)",
    "llm2clip_7b": "LLaVA-1.5 7B + LLM2CLIP (paper)",
}


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """One benchmark: its files, how LLaVA answers it, its scoring rule, its published numbers."""

    name: str  # on the command line and in score files
    title: str  # in tables
    order: int = 1000  # position in tables; equal ones by name
    headline: str = "accuracy_percent"  # key of the headline number in the metrics
    # headline number in the published unit = metrics[headline] * scale
    scale: float = 1.0
    unit: str = "%"  # of the headline number
    folders: tuple[str, ...]  # names of its folder in LLaVA's playground/data/eval
    # glob patterns, below the folder, of the files that it is scored with
    annotations: tuple[str, ...]
    question_files: tuple[str, ...]  # glob patterns of LLaVA's question file
    # of the split with public annotations, where LLaVA's file is another's
    scored_question_files: tuple[str, ...] = ()
    image_folders: tuple[str, ...] = ("",)  # below the folder, tried in order
    # of ``llava evaluate``, as in LLaVA's scripts/v1_5/eval
    evaluate_options: tuple[str, ...] = ()
    # the program that writes the file for --reviews; "": scored from the answers alone
    judge: str = ""
    submission_format: str = ""  # json | jsonl: what its server accepts; "": no server
    # headline number by model
    published: Mapping[str, float] = field(default_factory=dict)
    answered_only: bool = False  # the headline is the mean over answered questions
    # what the statistic reads besides score; without them scores are averaged
    item_fields: tuple[str, ...] = ()

    @abstractmethod
    def load(self, folder: Path) -> list[Question]:
        """Questions with their truth. Raises FileNotFoundError or ValueError for missing or
        unusable annotations."""

    @abstractmethod
    def score_item(self, question: Question, answer: Answer | None) -> Item:
        """One question's item (see ``item_of``); ``answer`` is None if the question has none."""

    def items(
        self, questions: Sequence[Question], answers: Sequence[Answer | None]
    ) -> list[Item]:
        """The items of the questions, each with the answer at its place."""
        return [self.score_item(*pair) for pair in zip(questions, answers, strict=True)]

    def metrics(self, items: Sequence[Item]) -> dict[str, float]:
        """All numbers, under the official script's names."""
        return {"accuracy_percent": 100 * mean_of(items)}

    def counts(self, items: Sequence[Item]) -> dict[str, int]:
        """Additional counts, such as answers in which no option is recognized."""
        return {}

    def statistic(self, items: Sequence[Item]) -> Statistic:
        """The headline number as a function of sums over items: mean score (of the answered ones),
        percent."""
        answered = (
            [not item.get("missing") for item in items] if self.answered_only else None
        )
        return mean_statistic([item["score"] for item in items], answered)

    # Which answer belongs to which question

    def question_keys(self, question: Question) -> tuple[Hashable, ...]:
        """Keys that its answers are looked up by. Of several questions with one key, the k-th gets
        the k-th answer."""
        return (str(question.id),)

    def answer_key(self, answer: Answer) -> Hashable | None:
        """The key of the question that a row of LLaVA's answers or of a submission answers; None:
        unknown."""
        return str(answer.id)  # numbers in one file are often strings in the other

    # Scoring

    def score(
        self, folder: Path, answers: Answers, *, allow: float = ALLOWED
    ) -> ScoreFile:
        """Score answers, or a judge's reviews of them, with the annotations in ``folder``. Raises
        ValueError if more than the fraction ``allow`` is missing, duplicate, unreadable or unknown,
        and for another benchmark's."""
        with errors_about(
            f"the {self.title} files in {folder}", fix="download them again"
        ):
            questions = self.load(folder)
        keys = [self.question_keys(question) for question in questions]
        targets = places(keys, map(self.answer_key, answers.rows))
        joined, counts, notes = match(
            questions, answers, targets, allow=allow, name=self.name
        )
        with errors_about(
            f"the {self.title} files in {folder}", fix="download them again"
        ):
            items = self.items(questions, joined)
            return ScoreFile(
                benchmark=self.name,
                model=answers.model,
                metrics=self.metrics(items),
                items=items,
                counts={**counts, **self.counts(items)},
                notes=notes,
            )

    # Files

    def require(self, folder: Path, *patterns: str, where: str) -> Path:
        """The first file below ``folder`` that matches a pattern; FileNotFoundError says where to
        get it."""
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}; --data must be LLaVA's evaluation folder of {self.name}"
            )
        if (path := first_file(folder, *patterns)) is None:
            raise FileNotFoundError(
                f"{folder} has no {' or '.join(patterns)}, needed to score {self.name}; {where}"
            )
        return path

    def data_digest(self, folder: Path) -> str:
        """One SHA-256 over the names and contents of the annotation files, or of ``folder`` if it
        is a file."""
        if folder.is_file():
            return sha256_file(folder)
        paths = sorted(
            {
                path
                for pattern in self.annotations
                for path in folder.glob(pattern)
                if path.is_file()
            }
        )
        return sha256_text(
            "".join(
                f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n"
                for path in paths
            )
        )

    def question_rows(self, folder: Path) -> list[Row]:
        """Rows of a question file for ``scored_question_files`` that LLaVA does not ship, made from
        the annotations."""
        return []

    def image_bytes(self, folder: Path, item: Item) -> bytes | None:
        """The encoded picture of an item, or None; next to ``folder`` if it is a file."""
        return find_image(
            self.image_folders,
            folder.parent if folder.is_file() else folder,
            str(item["image"]),
        )

    def submission_rows(self, folder: Path, answers: Answers) -> list[Row]:
        """Rows of the file that its server scores."""
        raise NotImplementedError(f"{self.name} has no server")

    def write_submission(self, folder: Path, answers: Answers, output: Path) -> None:
        """Write the file that its server scores, atomically."""
        rows = self.submission_rows(folder, answers)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(
            output,
            json.dumps(rows) if self.submission_format == "json" else "".join(lines),
        )


def published_scores(**numbers: float) -> dict[str, float]:
    """``published`` of a benchmark: headline numbers by model, of those that reported one."""
    return {MODELS[model]: number for model, number in numbers.items()}


def question_row(identifier: int | str, image: str, prompt: str) -> Row:
    """A row of a question file in LLaVA's format."""
    return {
        "question_id": identifier,
        "image": image,
        "text": prompt,
        "category": "default",
    }


def texts_by_id(answers: Answers, asked: Sequence[int | str]) -> dict[str, str]:
    """Texts by id; ValueError if one that was ``asked`` has none, since the server rejects an
    incomplete file."""
    texts = {
        str(answer.id): answer.text
        for answer in answers.rows
        if answer.text is not None
    }
    if missing := [identifier for identifier in asked if str(identifier) not in texts]:
        raise ValueError(
            f"{answers.path} lacks {len(missing)} answers, as to {missing[0]}; the server needs all"
        )
    return texts


def first_file(folder: Path, *patterns: str) -> Path | None:
    """The first file below ``folder`` that matches a pattern, or None."""
    matches = (
        path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    )
    return next(matches, None)


def find_image(image_folders: Sequence[str], folder: Path, name: str) -> bytes | None:
    """An image file below ``folder``, with any suffix; None if there is none or ``name`` leads
    outside."""
    inside = folder.resolve()
    for below in image_folders:
        base = folder / below / name
        for path in (base, *(base.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)):
            if path.is_file() and inside in path.resolve().parents:
                return path.read_bytes()
    return None
