"""How probable is it that a question is guessed right? As its options say, where logs have them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_integration.evaluator.compare.sides import Run
from llm2clip_plugin.errors import ContractError

LETTER = re.compile(r"\(?[A-Z]\)?\.?", re.IGNORECASE)  # an option's: A, (b), c.
DIGIT = re.compile(r"\d")  # an option's number
# of the questions without options: with more letters among their truths, options are unknown
FEW_LETTERS = 0.1
# of the questions without options: if they have no more right answers than these, each of
# REPEATED questions on average, a guess is right now and then
FEW_TRUTHS = 20
REPEATED = 10
BELOW_CHANCE = 3.0  # standard errors
SET_CHANCE = (
    "add --blind-chance 0.25 for four options (1 divided by their number), or --blind-chance 0 for "
    "free text"
)


@dataclass(frozen=True, kw_only=True)
class Guessing:
    """The probabilities that each of N questions is guessed right. They differ where a question is
    right only if all rotations of its options are: whether a guess goes with the option, or is made
    anew for each rotation, is unknown."""

    least_N: np.ndarray
    most_N: np.ndarray
    notes: tuple[str, ...] = ()


def guessing(runs: Sequence[Run], chance: float | None) -> Guessing:
    """By the options that some of the ``runs``, all on the same questions, has; ``chance`` is that
    of the other questions. If it is None, these are taken for free text, which nobody guesses.
    Raises ContractError if they do not look like that."""
    least = []
    most = []
    truths = []  # of questions without options
    for items in zip(*(run.items for run in runs), strict=True):
        options = max(option_count(item) for item in items)
        if options:
            rotations = max(rotation_count(item) for item in items)
            most.append(1 / options)
            least.append((1 / options) ** rotations)
        else:
            most.append(chance or 0.0)
            least.append(chance or 0.0)
            truths.append(truth_of(items))
    if chance is None:
        check_free_text(truths, len(most))
    notes = notes_of(len(truths), len(most), chance)
    return Guessing(least_N=np.array(least), most_N=np.array(most), notes=notes)


def option_count(item: dict[str, Any]) -> int:
    """Between how many answers a guess chooses; 0: unknown."""
    options = item.get("choices")
    if isinstance(options, list) and len(options) > 1:
        return len(options)
    return 2 if yes_or_no(item) else 0


def yes_or_no(item: dict[str, Any]) -> str:
    """The right answer, if it is yes or no; else ""."""
    truth = truth_of([item]).lower().rstrip(".")
    return truth if truth in ("yes", "no") else ""


def rotation_count(item: dict[str, Any]) -> int:
    """How many answers to an item, of other orders of the options, must be right."""
    rows = item.get("rows")
    if rows:
        return len(rows)
    return item.get("turns", 1)


def truth_of(items: Sequence[dict[str, Any]]) -> str:
    """The right answer to a question, of which there are items of several logs; "" if none has
    it."""
    for item in items:
        truth = item.get("truth")
        if isinstance(truth, list) and len(truth) == 1:
            truth = truth[0]
        if truth not in (None, "", []):
            return str(truth).strip()
    return ""


def check_free_text(truths: Sequence[str], questions: int) -> None:
    """Raises ContractError if the right answers to questions without options are not in the logs,
    look like letters or numbers of options, or are few."""
    if not truths:
        return
    missing = sum(not truth for truth in truths)
    letters = [
        truth.strip("().").upper() for truth in truths if LETTER.fullmatch(truth)
    ]
    distinct = len({truth.lower() for truth in truths})
    all_digits = all(DIGIT.fullmatch(truth) for truth in truths)
    remedy = SET_CHANCE
    if missing > FEW_LETTERS * len(truths):
        reason = "nor the right answers, which would tell free text"
    elif len(letters) > FEW_LETTERS * len(truths):
        reason = "but letters as the right answers"
        remedy = chance_of(sorted(set(letters)))
    elif all_digits:
        reason = "but digits as the right answers"
        remedy = chance_of(sorted(set(truths)))
    elif distinct <= FEW_TRUTHS and REPEATED * distinct <= len(truths):
        reason = f"but {distinct} right answers in all"
    else:
        return
    raise ContractError(
        f"the logs do not have the options of {len(truths)} of {questions} questions, "
        f"{reason}; {remedy}"
    )


def chance_of(names: Sequence[str]) -> str:
    """What to type if options have these letters or digits, in order."""
    if len(names) < 2:
        return SET_CHANCE
    return (
        f"the right answers go from {names[0]} to {names[-1]}: if there are {len(names)} options, "
        f"add --blind-chance {1 / len(names):.3g}; if these are no options, --blind-chance 0"
    )


def notes_of(unknown: int, questions: int, chance: float | None) -> tuple[str, ...]:
    """What is assumed about questions without options."""
    if not unknown:
        if chance is None:
            return ()
        return ("--blind-chance is not used: the options of all questions are known",)
    of_questions = f"{unknown} of {questions} questions have no options in the logs"
    if chance is None:
        return (
            f"{of_questions} and are taken for free text, which nobody guesses right; {SET_CHANCE}",
        )
    return (f"{of_questions}; {chance:.1%} of these are guessed (--blind-chance)",)


def check_not_below_chance(
    blind_runs: Sequence[Run], right_JN: np.ndarray, chance_N: np.ndarray
) -> None:
    """Raises ContractError for a blind log that is right less often than by guessing: its model
    declines to answer without a picture, which tells nothing about the questions."""
    expected = float(chance_N.mean())
    error = float(np.sqrt(np.sum(chance_N * (1 - chance_N)))) / len(chance_N)
    for run, right_N in zip(blind_runs, right_JN, strict=True):
        accuracy = float(right_N.mean())
        if accuracy < expected - BELOW_CHANCE * error:
            raise ContractError(
                f"the blind log of {run.model or 'a model'} is right on {accuracy:.1%} of the "
                f"questions, guessing on {expected:.1%}; does it decline to answer?"
            )
