"""Joining answers to questions by key, never by order; missing, duplicate, unknown and unreadable answers are counted.

Of two answers to a question the last counts, as in LLaVA's own conversion scripts.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from llava_integration.benchmarks.answers import Answer, Answers
from llava_integration.benchmarks.base import Options, Question

SUFFIXES = (" answer the question using", " answer with the option", " please answer")  # lmms-eval's, behind a question


class OtherBenchmarkError(ValueError):
    """The answers are to other questions than the benchmark's."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The answer to each question, in the questions' order (None: no answer), with counts and notes of the problems."""

    answers: tuple[Answer | None, ...]
    counts: dict[str, int]
    notes: list[str]


class Places:
    """Questions by key: of several questions with one key, the k-th answer is the k-th's, later ones the last's."""

    def __init__(self, questions: Sequence[Question], question_keys: Callable[[Question], Sequence[Hashable]]):
        self._places: dict[Hashable, list[int]] = {}
        self._seen: Counter[Hashable] = Counter()
        for place, question in enumerate(questions):
            for key in question_keys(question):
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
    questions: Sequence[Question],
    answers: Answers,
    options: Options,
    *,
    name: str,
    question_keys: Callable[[Question], Sequence[Hashable]],
    answer_key: Callable[[Answer], Hashable | None],
    logged_key: Callable[[Answer], Hashable | None],
    joined_by_prompt: bool,
) -> Matched:
    """Join ``answers`` to ``questions``.

    ``answer_key`` gives the key of the question that a row of LLaVA's or a submission answers, ``logged_key`` the same
    for lmms-eval's rows; those without a key are joined by doc_id, then by the question's text. Raises
    OtherBenchmarkError for answers to another benchmark, ValueError if too many are missing, duplicate or unreadable.
    """
    places = Places(questions, question_keys)
    ambiguous: list[Answer] = []
    if answers.layout == "lmms_eval":
        targets = _match_log(questions, answers, places, logged_key, ambiguous)
    else:
        targets = [places.next(answer_key(answer)) for answer in answers.rows]
    joined, unknown, counts = _collect(len(questions), answers, targets)
    if len(ambiguous) > options.allow * len(answers.rows):
        raise ValueError(
            f"{len(ambiguous)} rows of {answers.path} name no question, and several questions of {name} have their "
            f"text (line {ambiguous[0].line}: {ambiguous[0].prompt[:80]!r}): the log is in another order than --data; "
            "score with the annotations that lmms-eval used, or evaluate with LLaVA's questions"
        )
    _refuse_other_benchmark(questions, answers, joined, unknown, options, name, joined_by_prompt)
    _refuse_faults(counts, answers, options, name)
    return Matched(answers=tuple(joined), counts=counts, notes=_notes(counts, answers, name))


def _collect(
    questions: int, answers: Answers, targets: Sequence[int | None]
) -> tuple[list[Answer | None], list[Answer], dict[str, int]]:
    """The last answer to each question, the answers to no known question, and the score file's counts."""
    joined: list[Answer | None] = [None] * questions
    duplicate, textless, unknown = 0, 0, []
    for answer, place in zip(answers.rows, targets, strict=True):
        if place is None:
            unknown.append(answer)
        elif answer.text is None:
            textless += 1
        else:
            duplicate += joined[place] is not None
            joined[place] = answer
    given = [answer for answer in joined if answer is not None]
    counts = {
        "questions": questions,
        "answered": len(given),
        "missing": questions - len(given),
        "doubled": duplicate,
        "foreign": len(unknown),
        "unparsable": answers.unparsable + textless,
        "empty": sum(not (answer.text or "").strip() for answer in given),
    }
    return joined, unknown, counts


def _match_log(
    questions: Sequence[Question],
    answers: Answers,
    places: Places,
    logged_key: Callable[[Answer], Hashable | None],
    ambiguous: list[Answer],
) -> list[int | None]:
    """Places of lmms-eval's rows: by the key in the row, by doc_id, by the question's text.

    Rows whose text several questions share and whose doc_id is none of theirs are appended to ``ambiguous``.
    """
    texts = [squeeze(question.text) for question in questions]
    by_text: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        by_text.setdefault(text, []).append(place)
    targets: list[int | None] = []
    taken: set[int] = set()
    for answer in answers.rows:
        prompt = squeeze(answer.prompt)
        place = places.next(logged_key(answer))
        number = answer.row.get("doc_id")
        if place is None and isinstance(number, int) and 0 <= number < len(questions) and texts[number] in prompt:
            place = number
        if place is None:
            known = next((text for text in _without_suffix(prompt) if text in by_text), "")
            free = [p for p in by_text.get(known, []) if p not in taken]
            same_truth = [p for p in free if questions[p].truth == answer.row.get("target")] or free
            place = same_truth[0] if same_truth else None
            if len(same_truth) > 1:
                ambiguous.append(answer)
        if place is not None:
            taken.add(place)
        targets.append(place)
    return targets


def _without_suffix(prompt: str) -> list[str]:
    """Beginnings of a squeezed prompt that may be the question."""
    ends = [prompt.find(suffix) for suffix in SUFFIXES]
    return [prompt, *(prompt[:end] for end in ends if end > 0)]


def _refuse_other_benchmark(
    questions: Sequence[Question],
    answers: Answers,
    joined: Sequence[Answer | None],
    unknown: Sequence[Answer],
    options: Options,
    name: str,
    joined_by_prompt: bool,
) -> None:
    """OtherBenchmarkError if the ids are not this benchmark's, or the prompts ask other questions."""
    answered = [(question, answer) for question, answer in zip(questions, joined, strict=True) if answer is not None]
    if not answered or len(unknown) > max(options.allow, 1 / len(answers.rows)) * len(answers.rows):
        example = unknown[0] if unknown else answers.rows[0]
        shown = f"id {example.id!r}" if example.id is not None else f"doc_id {example.row.get('doc_id')!r}"
        no_prompt = joined_by_prompt and answers.layout == "llava" and not answers.rows[0].prompt
        raise OtherBenchmarkError(
            f"{len(unknown)} of {len(answers.rows)} answers in {answers.path} match no question of {name} "
            f"({len(questions)} questions, first id {questions[0].id!r}; line {example.line} has {shown}, "
            f"prompt {example.prompt[:80]!r})."
            + f" The rows have no prompt, which joins answers to {name}." * no_prompt
            + " Check BENCHMARK, --data and --answers; if --data is a subset of what was answered, pass --allow-missing"
        )
    prompted = [(question, answer) for question, answer in answered if answer.prompt]
    wrong = [pair for pair in prompted if squeeze(pair[0].text) not in squeeze(pair[1].prompt)]
    if len(wrong) > 0.5 * len(prompted):
        question, answer = wrong[0]
        raise OtherBenchmarkError(
            f"{answers.path} has ids of {name}, but other questions: line {answer.line}, id {question.id!r}, has the "
            f"prompt {answer.prompt[:80]!r}, and the question is {question.text[:80]!r}. "
            "Check BENCHMARK, --data and --answers"
        )


def _refuse_faults(counts: dict[str, int], answers: Answers, options: Options, name: str) -> None:
    """ValueError if more than the allowed fraction is missing, duplicate or unreadable."""
    for fault, total, meaning in (
        ("missing", counts["questions"], f"of {counts['questions']} questions of {name} have no answer"),
        ("doubled", counts["questions"], "answers are to a question that an earlier line answered"),
        ("unparsable", len(answers.rows) + answers.unparsable, "lines have no answer"),
    ):
        if counts[fault] > options.allow * total:
            where = f"; first: {answers.first_unparsable}" if fault == "unparsable" and answers.first_unparsable else ""
            raise ValueError(
                f"{counts[fault]} {meaning} in {answers.path}{where}: more than the allowed {options.allow:.0%}. "
                "Finish the evaluation (an incomplete file, or chunks of different runs?), or pass --allow-missing"
            )


def _notes(counts: dict[str, int], answers: Answers, name: str) -> list[str]:
    """One sentence per kind of fault, for the terminal and the report."""
    notes = list(answers.notes)
    if counts["missing"]:
        notes.append(f"{counts['missing']} of {counts['questions']} questions of {name} have no answer")
    if counts["doubled"]:
        notes.append(f"{counts['doubled']} duplicate answers; the last one to a question counts")
    if counts["foreign"]:
        notes.append(f"{counts['foreign']} answers match no question; ignored")
    if counts["unparsable"]:
        first = f", first at {answers.first_unparsable}" if answers.first_unparsable else ""
        notes.append(f"{counts['unparsable']} lines have no answer{first}")
    if counts["empty"]:
        most = 2 * counts["empty"] > counts["answered"]
        notes.append(f"{counts['empty']} answers are empty" + (": did the evaluation fail?" if most else ""))
    return notes
