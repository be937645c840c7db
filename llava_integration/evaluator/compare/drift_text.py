"""What changed between two runs of one model, in plain words (Markdown)."""

from collections.abc import Sequence

from llava_integration.evaluator.compare.drift import MISSING, Change, Drift
from llava_integration.evaluator.compare.report import (
    number,
    plain,
    plain_sentence,
    table,
)

EXAMPLES = 3  # ids that are listed of a cause
MOST_SETTINGS = 20  # lines of settings that differ
HEADER = ("cause", "questions", "better", "worse", "points", "for example")


def drift_text(
    drifts: Sequence[Drift], names: Sequence[str], notes: Sequence[str]
) -> str:
    """The report; ``names``: of base and of new; ``notes``: on what is left out, and on the sides,
    which come first."""
    base, new = map(plain, names)
    lines = [f"# What changed from {base} to {new}?"]
    if notes:
        lines += ["", *(f"- {plain_sentence(note)}" for note in notes)]
    for drift in drifts:
        lines += ["", *benchmark_lines(drift, base, new)]
    return "\n".join(lines) + "\n"


def benchmark_lines(drift: Drift, base: str, new: str) -> list[str]:
    """The lines of one benchmark."""
    unit = drift.unit
    difference = number(drift.new - drift.base, unit, signed=True)
    lines = [
        f"## {plain(drift.title)}: {number(drift.base, unit)} -> {number(drift.new, unit)} "
        f"({difference}), mean score of a question",
        "",
        f"{drift.questions} questions are in both logs; {drift.differing} have another score.",
    ]
    if drift.changes:
        lines += [
            "",
            *table(HEADER, [cells(change, drift) for change in drift.changes]),
        ]
    more = []
    only_base, only_new = drift.only
    if only_base or only_new:
        more.append(
            f"{only_base} questions are in {base} alone, {only_new} in {new} alone."
        )
    other_prompt, other_answer = drift.same_score
    if other_prompt:
        more.append(f"{other_prompt} questions have another prompt and the same score.")
    if other_answer:
        more.append(f"{other_answer} questions have another answer and the same score.")
    if drift.renumbered:
        more.append(
            f"{drift.renumbered} questions of {new} have the prompt of another question of {base}: "
            "the logs number the questions in different ways, and what is compared are different "
            "questions."
        )
    for line in drift.settings[:MOST_SETTINGS]:
        more.append(f"The logs say they were made with other settings: {plain(line)}")
    if more:
        lines += ["", *(f"- {line}" for line in more)]
    return lines


def cells(change: Change, drift: Drift) -> tuple[str, ...]:
    """A change's columns under HEADER."""
    count = str(len(change.ids))
    if change.cause == MISSING:
        count = str(sum(drift.only))
    examples = ", ".join(plain(identifier) for identifier in change.ids[:EXAMPLES])
    if len(change.ids) > EXAMPLES:
        examples += ", ..."
    points = number(change.points, drift.unit, signed=True)
    return (
        change.cause,
        count,
        str(change.better),
        str(change.worse),
        points,
        examples,
    )
