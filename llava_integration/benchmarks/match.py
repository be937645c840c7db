"""Joining answers to questions by what identifies them, never by their order; every fault counted.

The last answer to a question counts, as in LLaVA's own conversion scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from llava_integration.benchmarks.answers import Answer, Answers, Row
from llava_integration.benchmarks.base import Options, Question

Key = Hashable
BY_PROMPT = ("mme", "textvqa")  # several questions of an image share the id that LLaVA gives them


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The answer of each question, in the questions' order (None: no answer), and what went wrong."""

    answers: tuple[Answer | None, ...]
    counts: dict[str, int]
    notes: list[str]


def squeeze(text: str) -> str:
    """Lower case, runs of white space as one space: how questions are compared."""
    return " ".join(text.lower().split())


def by_id(entry: Question | Answer) -> str:
    """The id as a text: numbers in one file are often texts in the other."""
    return str(entry.id)


def match(
    questions: Sequence[Question],
    answers: Answers,
    options: Options,
    *,
    name: str,
    question_key: Callable[[Question], Key] = by_id,
    answer_key: Callable[[Answer], Key | None] = by_id,
    logged_key: Callable[[Row], Key | None] | None = None,
) -> Matched:
    """Join ``answers`` to ``questions``; ValueError if they are another benchmark's, or too few.

    ``answer_key`` says which question a LLaVA or submission row answers; ``logged_key`` the same of an lmms-eval row
    that names its question. Rows that don't are found by doc_id, then by the question's text.
    """
    places = {question_key(question): place for place, question in enumerate(questions)}
    ambiguous: list[Answer] = []
    if answers.layout == "lmms_eval":
        targets = _match_log(questions, answers, places, logged_key, ambiguous)
    else:
        targets = [places.get(key) if (key := answer_key(answer)) is not None else None for answer in answers.rows]
    found: list[Answer | None] = [None] * len(questions)
    doubled, textless, foreign = 0, 0, []
    for answer, place in zip(answers.rows, targets, strict=True):
        if place is None:
            foreign.append(answer)
        elif answer.text is None:
            textless += 1
        else:
            doubled += found[place] is not None
            found[place] = answer
    counts = {
        "questions": len(questions),
        "answered": sum(answer is not None for answer in found),
        "missing": sum(answer is None for answer in found),
        "doubled": doubled,
        "foreign": len(foreign),
        "unparsable": answers.unparsable + textless,
        "empty": sum(answer is not None and not (answer.text or "").strip() for answer in found),
    }
    if len(ambiguous) > options.allow * len(answers.rows):
        raise ValueError(
            f"{len(ambiguous)} rows of {answers.path} name no question, and several of {name} have their text "
            f"(line {ambiguous[0].line}: {ambiguous[0].prompt[:80]!r}): the log is in another order than --data, so "
            "they can't be joined; score with the annotations that lmms-eval used, or evaluate with LLaVA's questions"
        )
    _refuse_other_benchmark(questions, answers, found, foreign, name, options)
    refuse_faults(counts, answers, options, name)
    return Matched(answers=tuple(found), counts=counts, notes=describe_faults(counts, answers, name))


def _match_log(
    questions: Sequence[Question],
    answers: Answers,
    places: dict[Key, int],
    logged_key: Callable[[Row], Key | None] | None,
    ambiguous: list[Answer],
) -> list[int | None]:
    """Places of lmms-eval rows: by the id that the row holds, by doc_id, by the question's text.

    ``ambiguous`` takes the rows whose text several questions share and whose doc_id is none of theirs.
    """
    texts = [squeeze(question.text) for question in questions]
    by_text: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        by_text.setdefault(text, []).append(place)
    targets: list[int | None] = []
    taken: set[int] = set()
    for answer in answers.rows:
        prompt = squeeze(answer.prompt)
        key = logged_key(answer.row) if logged_key else None
        place = places.get(key) if key is not None else None
        number = answer.row.get("doc_id")
        if place is None and isinstance(number, int) and 0 <= number < len(questions) and texts[number] in prompt:
            place = number
        if place is None:
            known = next((text for text in _heads(prompt) if text in by_text), "")
            free = [p for p in by_text.get(known, []) if p not in taken]
            alike = [p for p in free if questions[p].truth == answer.row.get("target")] or free
            place = alike[0] if alike else None
            if len(alike) > 1:
                ambiguous.append(answer)
        if place is not None:
            taken.add(place)
        targets.append(place)
    return targets


def _heads(prompt: str) -> list[str]:
    """Beginnings of a squeezed prompt that may be the question: lmms-eval puts its suffix behind."""
    ends = [prompt.find(mark) for mark in (" answer the question using", " answer with the option", " please answer")]
    return [prompt, *(prompt[:end] for end in ends if end > 0)]


def _refuse_other_benchmark(
    questions: Sequence[Question],
    answers: Answers,
    found: Sequence[Answer | None],
    foreign: Sequence[Answer],
    name: str,
    options: Options,
) -> None:
    """ValueError if the ids are not this benchmark's, or they are but the prompts ask other questions."""
    answered = [(question, answer) for question, answer in zip(questions, found, strict=True) if answer is not None]
    if not answered or len(foreign) > max(options.allow, 1 / len(answers.rows)) * len(answers.rows):
        example = foreign[0] if foreign else answers.rows[0]
        shown = f"id {example.id!r}" if example.id is not None else f"doc_id {example.row.get('doc_id')!r}"
        raise ValueError(
            f"{len(foreign)} of {len(answers.rows)} answers in {answers.path} are to no question of {name} "
            f"({len(questions)} questions, first id {questions[0].id!r}; line {example.line} has {shown}, "
            f"prompt {example.prompt[:80]!r}). {_guess(answers, name)}Check BENCHMARK, --data and --answers; "
            "if the data is a part of what was answered, pass --allow-missing"
        )
    asked = [(question, answer) for question, answer in answered if answer.prompt]
    wrong = [pair for pair in asked if squeeze(pair[0].text) not in squeeze(pair[1].prompt)]
    if len(wrong) > 0.5 * len(asked):
        question, answer = wrong[0]
        raise ValueError(
            f"{answers.path} has ids of {name}, but asks other questions: line {answer.line}, id {question.id!r}, "
            f"prompt {answer.prompt[:80]!r}, while {name} asks {question.text[:80]!r}. {_guess(answers, name)}"
            "Check BENCHMARK, --data and --answers"
        )


def _guess(answers: Answers, name: str) -> str:
    """Which other benchmark the answers look like, or what they lack; "" if they tell nothing."""
    answer = answers.rows[0]
    if name in BY_PROMPT and answers.layout == "llava" and not answer.prompt:
        return f"The rows have no prompt, by which answers to {name} are joined. "
    signs = [
        ("mme", "/images/" in str(answer.id) or ("/" in str(answer.id) and "." in str(answer.id))),
        ("mmbench", "round_id" in answer.row or "option_char" in answer.row),
        ("textvqa", "Reference OCR token" in answer.prompt),
        ("vizwiz", "respond with 'Unanswerable'" in answer.prompt),
        ("scienceqa or seedbench", "Answer with the option's letter" in answer.prompt),
        ("pope", answer.prompt.startswith("Is there a") and "in the image?" in answer.prompt),
    ]
    names = [other for other, sign in signs if sign and name not in other]
    return f"They look like answers to {names[0]}. " if names else ""


def refuse_faults(counts: dict[str, int], answers: Answers, options: Options, name: str) -> None:
    """ValueError if more than the allowed share is missing, doubled or unparsable."""
    for fault, whole, meaning in (
        ("missing", counts["questions"], f"of {counts['questions']} questions of {name} have no answer"),
        ("doubled", counts["questions"], "answers are to a question that an earlier line answered"),
        ("unparsable", len(answers.rows) + answers.unparsable, "lines hold no answer"),
    ):
        if counts[fault] > options.allow * whole:
            where = f"; first: {answers.first_unparsable}" if fault == "unparsable" and answers.first_unparsable else ""
            raise ValueError(
                f"{counts[fault]} {meaning} in {answers.path}{where}: more than the allowed {options.allow:.0%}. "
                "Half a file, or a merge of the wrong chunks? Finish the evaluation, or pass --allow-missing to score "
                "what there is"
            )


def describe_faults(counts: dict[str, int], answers: Answers, name: str) -> list[str]:
    """One sentence a kind of fault, for the terminal and the report."""
    notes = list(answers.notes)
    if counts["missing"]:
        notes.append(f"{counts['missing']} of {counts['questions']} questions of {name} have no answer")
    if counts["doubled"]:
        notes.append(f"{counts['doubled']} answers are to a question answered before; the last one counts")
    if counts["foreign"]:
        notes.append(f"{counts['foreign']} answers are to no question of this data; left out")
    if counts["unparsable"]:
        first = f", first at {answers.first_unparsable}" if answers.first_unparsable else ""
        notes.append(f"{counts['unparsable']} lines hold no answer{first}")
    if counts["empty"]:
        most = 2 * counts["empty"] > counts["answered"]
        notes.append(f"{counts['empty']} answers are empty" + (": the evaluation went wrong?" if most else ""))
    return notes
