"""A benchmark is one file in ``rules/`` with a ``BENCHMARK``, an instance of a subclass of ``Benchmark``.

Each must define ``load`` and ``score_item``; everything else has a default. A question is one line of a benchmark's
annotations; an item is what a score file says about one question.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers, Row, read_answers
from llm2clip_plugin.contracts import atomic_file, sha256_file, sha256_text
from llm2clip_plugin.files import errors_about

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark, from its annotation files."""

    id: int | str  # the item's id in the score file, typed as in the annotations
    text: str  # without the suffix that LLaVA appends
    cluster: str  # its image: questions about one image are resampled together
    truth: Any  # label, letter, or list of human answers
    image: str = ""  # path below one of the benchmark's image folders
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose about scoring."""

    allow: float = 0.10  # largest fraction of missing, duplicate, unreadable or unknown answers; below one chunk of 8
    reviews: Path | None = None  # the judge's file, for benchmarks that need one


@dataclass(kw_only=True)
class Scored:
    """A benchmark's result for one answers file."""

    metrics: dict[str, float]
    items: list[Item]  # id, score, cluster, answer, truth, question, category, image ...
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statistic:
    """A headline number as a function of sums over questions. Shapes: N questions, K sums.

    A resample is a weight for each question, its totals are ``weight_N @ sums_NK``, and ``value`` maps totals (..., K)
    to numbers (...) in the published unit.
    """

    sums: np.ndarray  # (N, K)
    value: Callable[[np.ndarray], np.ndarray]
    strata: np.ndarray | None = None  # (N,) integers: images are drawn within their part, whose size is fixed
    counted: np.ndarray | None = None  # (N,) booleans: the questions that the number is about; None: all

    def full(self) -> float:
        """The number on all questions, each once."""
        return float(self.value(self.sums.sum(axis=0)))


def text_of(answer: Answer | None) -> str:
    """The answer's text; "" for a missing answer."""
    return answer.text or "" if answer else ""


def item_of(question: Question, answer: Answer | None, /, **fields: Any) -> Item:
    """An item: what every benchmark records about a question, and ``fields`` (``score`` at least)."""
    return {
        "id": question.id,
        "cluster": question.cluster,
        "answer": text_of(answer),
        "missing": answer is None,
        "truth": question.truth,
        "question": question.text,
        "category": question.category,
        "image": question.image,
        **fields,
    }


def mean(values: Sequence[float]) -> float:
    """Plain mean, added in the order given as the official scripts do; 0.0 for no values."""
    return float(sum(values)) / len(values) if values else 0.0


def mean_of(items: Sequence[Item], field: str = "score") -> float:
    """Mean of a field over items."""
    return mean([item[field] for item in items])


def by_group(items: Sequence[Item], group: str) -> dict[str, list[float]]:
    """Scores, listed by another field, groups in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(str(item[group]), []).append(float(item["score"]))
    return groups


def percents(items: Sequence[Item], group: str) -> dict[str, float]:
    """Mean score in each group, percent, rounded to 2 places as the official scripts print it."""
    return {key: round(100 * mean(values), 2) for key, values in by_group(items, group).items()}


def precision_recall_f1(true_yes: int, false_yes: int, false_no: int) -> tuple[float, float, float]:
    """Precision, recall and F1 of "yes"; 0 where the divisor is 0."""
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested dictionaries under dotted names: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1.0}``."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = float(value)
    return flat


def mean_statistic(values: Sequence[float], counted: Sequence[bool] | None = None, scale: float = 100.0) -> Statistic:
    """The statistic ``scale x mean`` over the questions that count."""
    weight = np.ones(len(values)) if counted is None else np.asarray(counted, dtype=float)
    sums = np.stack([np.asarray(values, dtype=float) * weight, weight], axis=1)
    return Statistic(sums, lambda totals: scale * ratio(totals[..., 0], totals[..., 1]), counted=weight > 0)


def answered_statistic(items: Sequence[Item]) -> Statistic:
    """Mean score of the answered questions, percent."""
    return mean_statistic([item["score"] for item in items], [not item.get("missing") for item in items])


def mean_of_parts(parts: Sequence[str], scores: Sequence[float], scale: float) -> Statistic:
    """The statistic ``scale x mean over parts of the part's mean score``."""
    names = sorted(set(parts))
    sums = np.zeros((len(scores), 2 * len(names)))
    for row, (part, score) in enumerate(zip(parts, scores, strict=True)):
        column = 2 * names.index(part)
        sums[row, column : column + 2] = score, 1
    return Statistic(sums, lambda totals: scale * ratio(totals[..., 0::2], totals[..., 1::2]).mean(axis=-1))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient, 0 where the divisor is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


# Answers are joined to questions by key, never by order. Of two answers to a question the last counts, as in LLaVA's
# own conversion scripts.

SUFFIXES = (" answer the question using", " answer with the option", " please answer")  # lmms-eval's, behind a question


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The answer to each question, in the questions' order (None: no answer), with counts and notes of the problems."""

    answers: tuple[Answer | None, ...]
    counts: dict[str, int]
    notes: list[str]


class Places:
    """Questions by key: of several questions with one key, the k-th answer is the k-th's, later ones the last's."""

    def __init__(self, keys: Sequence[Sequence[Hashable]]):
        """``keys``: of each question."""
        self._places: dict[Hashable, list[int]] = {}
        self._seen: Counter[Hashable] = Counter()
        for place, of_question in enumerate(keys):
            for key in of_question:
                self._places.setdefault(key, []).append(place)

    def next(self, key: Hashable | None) -> int | None:
        """The place of the question that an answer with this key belongs to; None for an unknown key."""
        places = self._places.get(key)
        if key is None or places is None:
            return None
        self._seen[key] += 1
        return places[min(self._seen[key], len(places)) - 1]


def squeeze(text: str) -> str:
    """Lower case, each run of white space as one space: how questions are compared."""
    return " ".join(text.lower().split())


def match(
    questions: Sequence[Question], answers: Answers, targets: Sequence[int | None], *, allow: float, name: str
) -> Matched:
    """Count and check what was joined; ``targets``: the place of each row's question, None for an unknown one.

    Raises ValueError for answers to another benchmark than ``name``, or if more than the fraction ``allow`` is missing,
    duplicate or unreadable.
    """
    joined: list[Answer | None] = [None] * len(questions)
    doubled, textless, unknown = 0, 0, []
    for answer, place in zip(answers.rows, targets, strict=True):
        if place is None:
            unknown.append(answer)
        elif answer.text is None:
            textless += 1
        else:
            doubled += joined[place] is not None
            joined[place] = answer
    given = [answer for answer in joined if answer is not None]
    counts = {
        "questions": len(questions),
        "answered": len(given),
        "missing": len(questions) - len(given),
        "doubled": doubled,
        "foreign": len(unknown),
        "unparsable": answers.unparsable + textless,
        "empty": sum(not (answer.text or "").strip() for answer in given),
    }
    _refuse_other_benchmark(questions, answers, joined, unknown, allow, name)
    for fault, total in (
        ("missing", len(questions)),
        ("doubled", len(questions)),
        ("unparsable", len(answers.rows) + answers.unparsable),
    ):
        if counts[fault] > allow * total:
            raise ValueError(
                f"{answers.path}: {_note(fault, counts, answers, name)}, more than the allowed {allow:.0%}. Finish the "
                "evaluation (an incomplete file, or chunks of different runs?), or pass --allow-missing"
            )
    faults = ("missing", "doubled", "foreign", "unparsable", "empty")
    notes = [_note(fault, counts, answers, name) for fault in faults if counts[fault]]
    return Matched(answers=tuple(joined), counts=counts, notes=[*answers.notes, *notes])


def match_log(
    questions: Sequence[Question], answers: Answers, keyed: Sequence[int | None], *, allow: float
) -> list[int | None]:
    """Places of lmms-eval's rows: by the key in the row (``keyed``), by doc_id, by the question's text.

    Raises ValueError if many rows have a text that several questions share and a doc_id that is none of theirs.
    """
    texts = [squeeze(question.text) for question in questions]
    by_text: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        by_text.setdefault(text, []).append(place)
    targets: list[int | None] = []
    taken: set[int | None] = set()
    ambiguous: list[Answer] = []
    for answer, place in zip(answers.rows, keyed, strict=True):
        prompt, number = squeeze(answer.prompt), answer.row.get("doc_id")
        if place is None and isinstance(number, int) and 0 <= number < len(questions) and texts[number] in prompt:
            place = number
        if place is None:
            ends = [prompt.find(suffix) for suffix in SUFFIXES]
            beginnings = [prompt, *(prompt[:end] for end in ends if end > 0)]
            known = next((text for text in beginnings if text in by_text), "")
            free = [p for p in by_text.get(known, []) if p not in taken]
            same_truth = [p for p in free if questions[p].truth == answer.row.get("target")] or free
            place = same_truth[0] if same_truth else None
            if len(same_truth) > 1:
                ambiguous.append(answer)
        taken.add(place)
        targets.append(place)
    if len(ambiguous) > allow * len(answers.rows):
        raise ValueError(
            f"{len(ambiguous)} rows of {answers.path} name no question, and several questions have their text (line "
            f"{ambiguous[0].line}: {ambiguous[0].prompt[:80]!r}): the log is in another order than --data; score with "
            "the annotations that lmms-eval used, or evaluate with LLaVA's questions"
        )
    return targets


def _refuse_other_benchmark(
    questions: Sequence[Question],
    answers: Answers,
    joined: Sequence[Answer | None],
    unknown: Sequence[Answer],
    allow: float,
    name: str,
) -> None:
    """ValueError if the ids are not this benchmark's, or the prompts ask other questions."""
    answered = [(question, answer) for question, answer in zip(questions, joined, strict=True) if answer is not None]
    if not answered or len(unknown) > max(allow, 1 / len(answers.rows)) * len(answers.rows):
        example = unknown[0] if unknown else answers.rows[0]
        raise ValueError(
            f"{len(unknown)} of {len(answers.rows)} answers in {answers.path} match no question of {name} (line "
            f"{example.line}: id {example.id!r}, prompt {example.prompt[:80]!r}; first question: id "
            f"{questions[0].id!r}). Check BENCHMARK, --data and --answers; for a subset pass --allow-missing"
        )
    prompted = [(question, answer) for question, answer in answered if answer.prompt]
    wrong = [pair for pair in prompted if squeeze(pair[0].text) not in squeeze(pair[1].prompt)]
    if len(wrong) > 0.5 * len(prompted):
        question, answer = wrong[0]
        raise ValueError(
            f"{answers.path} has ids of {name}, but other questions: line {answer.line} has the prompt "
            f"{answer.prompt[:80]!r}, question {question.id!r} is {question.text[:80]!r}. Check BENCHMARK and --data"
        )


def _note(fault: str, counts: dict[str, int], answers: Answers, name: str) -> str:
    """One kind of fault in a sentence."""
    first = f", first at {answers.first_unparsable}" if answers.first_unparsable else ""
    return {
        "missing": f"{counts['missing']} of {counts['questions']} questions of {name} have no answer",
        "doubled": f"{counts['doubled']} duplicate answers; the last one to a question counts",
        "foreign": f"{counts['foreign']} answers match no question; ignored",
        "unparsable": f"{counts['unparsable']} lines have no answer{first}",
        "empty": f"{counts['empty']} answers are empty",
    }[fault]


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
