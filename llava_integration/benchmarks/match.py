"""Joining answers to questions by key, never by order; missing, duplicate, unknown and unreadable answers are counted.

Of two answers to a question the last counts, as in LLaVA's own conversion scripts.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llava_integration.benchmarks.answers import Answer, Answers
from llava_integration.benchmarks.base import Question

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
        shown = f"id {example.id!r}" if example.id is not None else f"doc_id {example.row.get('doc_id')!r}"
        raise ValueError(
            f"{len(unknown)} of {len(answers.rows)} answers in {answers.path} match no question of {name} "
            f"({len(questions)} questions, first id {questions[0].id!r}; line {example.line} has {shown}, prompt "
            f"{example.prompt[:80]!r}). Check BENCHMARK, --data and --answers; if --data is a subset of what was "
            "answered, pass --allow-missing"
        )
    prompted = [(question, answer) for question, answer in answered if answer.prompt]
    wrong = [pair for pair in prompted if squeeze(pair[0].text) not in squeeze(pair[1].prompt)]
    if len(wrong) > 0.5 * len(prompted):
        question, answer = wrong[0]
        raise ValueError(
            f"{answers.path} has ids of {name}, but other questions: line {answer.line}, id {question.id!r}, has the "
            f"prompt {answer.prompt[:80]!r}, and the question is {question.text[:80]!r}. Check BENCHMARK, --data and "
            "--answers"
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
