"""Which questions need eyes? A difference, split by logs of answers without the pictures.

A question counts as solved blind if at least one blind log answers it right; else it needs eyes.
Each group has the mean difference of its questions, by the same test as the whole. A group is not
what it is called, though, and a verdict must hold whichever way it is read:

- Some questions that count as solved were guessed. Of those that nobody can solve blind, J blind
  logs solve ``luck = 1 - (1 - chance)^J``, with 1 / c of c options as chance. The mean over the
  questions that are really solved is the weighted mean with ``(solved - luck) / (1 - luck)``, if
  luck has nothing to do with the sides' answers. If a side guesses with and without the picture
  alike, it is nearer to the plain mean. So both must differ from 0, in the same direction.
- Some questions that count as needing eyes can be solved blind, and were missed. Up to MISSED of
  those that a model can solve are taken to be: the mean over the questions that really need eyes
  is the weighted mean with ``caught - solved``, where ``caught`` is how many of the questions that
  can be solved are. Again the plain mean and this one must both differ from 0.

The interval covers those of both readings, the p-value is the larger one: an intersection-union
test, which needs no correction for being two.

Questions that are answered by yes or no count in each group as in the whole benchmark: else a model
that says yes more often would gain where a blind model that says yes is right.

One blind log of one of the sides would be wrong: where that side guesses, it guesses the same with
the picture, so that among the questions that it does not solve blind it loses to any other model
(regression to the mean). With a log of each side, neither is at a disadvantage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import Statistic, ratio
from llava_integration.evaluator.compare.blind_models import (
    check_is_no_side,
    check_models,
)
from llava_integration.evaluator.compare.guessing import (
    check_not_below_chance,
    guessing,
    yes_or_no,
)
from llava_integration.evaluator.compare.multiplicity import holm, holm_factors
from llava_integration.evaluator.compare.pairing import MIN_OVERLAP, check_equal_truth
from llava_integration.evaluator.compare.sides import Run, Side
from llava_integration.evaluator.compare.statistics import Difference, compare, pair
from llm2clip_plugin.errors import ContractError

RIGHT = 0.5  # a blind answer with this score is right
# of the questions that a model can solve blind, its log misses at most so many
MISSED = 0.2
FEWEST = 5  # questions of a group with a test
SOLVED = "solved blind"
EYES = "need eyes"


@dataclass(frozen=True, kw_only=True)
class BlindLogs:
    """Logs of answers to the same questions without, or with other, pictures."""

    logs: tuple[Side, ...]
    # probability of guessing a question right whose options the logs do not have
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """New against base on the questions that are solved blind, or on those that need eyes."""

    name: str  # SOLVED or EYES
    questions: int
    # False if the group has no mean: it has no questions, or none with the answer yes, or no
    has_mean: bool
    base: float  # mean score of these questions, in percent
    new: float
    readings: tuple[Difference, ...]  # each of them must differ from 0
    p: float
    p_holm: float  # over all parts of a comparison
    interval: tuple[float, float]  # adjusted as p_holm is
    level: float

    @property
    def difference(self) -> float:
        """The mean difference of the questions in this group."""
        return self.new - self.base

    @property
    def verdict(self) -> str:
        """As a row's; "no verdict" for a group that nothing is known about."""
        if not self.readings:
            return "no verdict"
        if self.p_holm >= 1 - self.level:
            return "no difference shown"
        return "better" if self.difference > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = dict(vars(self))
        del plain["readings"], plain["level"], plain["has_mean"]
        plain |= {"difference": self.difference, "verdict": self.verdict}
        if not self.has_mean:
            plain |= {"base": None, "new": None, "difference": None}
        return plain


def split(
    name: str,
    base: tuple[Side, Sequence[Run]],
    new: tuple[Side, Sequence[Run]],
    blind: BlindLogs,
    *,
    level: float,
    min_overlap: float = MIN_OVERLAP,
    pair_runs: bool = False,
) -> tuple[list[Part], list[str]]:
    """Both parts of a difference on one benchmark, not yet adjusted, and notes. ``base``, ``new``:
    a side and its runs on the questions in common. Raises ContractError if the blind logs do not
    fit."""
    base_side, base_runs = base
    new_side, new_runs = new
    logs = [log for log in blind.logs if name in log.runs]
    if not logs:
        raise ContractError("no blind log has it")
    blind_runs = [run for log in logs for run in log.runs[name]]
    notes = check_models(name, base_side, new_side, logs)
    check_right_or_wrong([*base_runs, *new_runs, *blind_runs])
    ids = ids_in_common(base_runs[0], blind_runs, min_overlap)
    left_out = len(base_runs[0].ids) - len(ids)
    if left_out:
        notes.append(f"{left_out} questions are not in every blind log; not split")
    base_runs = [run.pick(ids) for run in base_runs]
    new_runs = [run.pick(ids) for run in new_runs]
    blind_runs = [run.pick(ids) for run in blind_runs]
    check_blind_runs(name, base_side, blind_runs, base_runs, new_runs)
    right_JN = np.array([run.scores for run in blind_runs]) >= RIGHT
    check_not_declined(blind_runs, right_JN)
    guessed = guessing([*base_runs, *new_runs, *blind_runs], blind.chance)
    notes += guessed.notes
    check_not_below_chance(blind_runs, right_JN, guessed.least_N)
    if not all(is_mean(run) for run in (*base_runs, *new_runs)):
        notes.append(
            "split is the mean score of the questions, not the headline number"
        )
    solved_N = np.any(right_JN, axis=0)
    is_yes_N = are_yes(base_runs[0])
    weights = part_weights(
        solved_N,
        guessed.most_N,
        len(blind_runs),
        is_yes_N,
        least_chance_N=guessed.least_N,
    )
    base_MN = np.array([run.scores for run in base_runs])
    new_MN = np.array([run.scores for run in new_runs])
    solved = int(solved_N.sum())
    questions = {SOLVED: solved, EYES: len(solved_N) - solved}
    make_part = partial(
        part_of,
        base_MN=base_MN,
        new_MN=new_MN,
        clusters=base_runs[0].clusters,
        level=level,
        pair_runs=pair_runs,
    )
    parts = []
    for part, of_part in weights.items():
        parts.append(make_part(part, weights=of_part, questions=questions[part]))
    lucky = luck_notes(solved_N, guessed.most_N, len(blind_runs), is_yes_N)
    return parts, [*notes, *lucky]


def luck_notes(
    solved_N: np.ndarray, chance_N: np.ndarray, logs: int, is_yes_N: np.ndarray | None
) -> list[str]:
    """What is said if the blind logs solve no more than guessing may, of all questions or of those
    with the answer yes, or no; and that these are balanced."""
    _, really_solved_N = part_weights(solved_N, chance_N, logs)[SOLVED]
    only_luck = []
    if is_yes_N is not None:
        for answer, members in (("yes", is_yes_N), ("no", ~is_yes_N)):
            if members.any() and really_solved_N[members].sum() <= 0:
                only_luck.append(answer)
    notes = []
    if really_solved_N.sum() <= 0:
        notes.append(
            "the blind logs solve no more questions than guessing may: either few can be solved "
            "blind, or their models do not know; only in the first case do the others need eyes"
        )
    elif only_luck:
        notes.append(
            f"of the questions with the answer {only_luck[0]} the blind logs solve no more than "
            "guessing may, so nothing is known about those that are solved blind"
        )
    if is_yes_N is not None:
        notes.append("yes and no count in both groups as in the whole benchmark")
    return notes


def has_truth(run: Run) -> bool:
    """Whether a run has the right answer to some question; a table of scores has none."""
    return any(item.get("truth") is not None for item in run.items)


def is_mean(run: Run) -> bool:
    """Whether the headline number is the mean score of the questions, which is split."""
    mean = run.scale * float(np.mean(run.scores))
    return math.isclose(run.statistic.full(), mean, rel_tol=1e-9, abs_tol=1e-9)


def check_right_or_wrong(runs: Sequence[Run]) -> None:
    """Raises ContractError for scores that are not from 0 to 1."""
    for run in runs:
        if min(run.scores) < 0 or max(run.scores) > 1:
            raise ContractError(
                "its scores are not from 0 to 1, so none is right or wrong"
            )


def ids_in_common(
    first: Run, blind_runs: Sequence[Run], min_overlap: float
) -> list[str]:
    """The questions of ``first`` that every blind log has, too; ContractError if they are less than
    ``min_overlap`` of its questions."""
    in_all = set(first.ids).intersection(*(run.ids for run in blind_runs))
    if len(in_all) < max(1.0, min_overlap * len(first.ids)):
        raise ContractError(
            f"the blind logs have {len(in_all)} of {len(first.ids)} questions"
        )
    return [identifier for identifier in first.ids if identifier in in_all]


def check_blind_runs(
    name: str,
    base_side: Side,
    blind_runs: Sequence[Run],
    base_runs: Sequence[Run],
    new_runs: Sequence[Run],
) -> None:
    """ContractError for a blind log with other right answers than the base's, or of a side."""
    for run in blind_runs:
        if has_truth(run) and has_truth(base_runs[0]):
            check_equal_truth(name, base_side, base_runs[0], run)
        check_is_no_side(run, [*base_runs, *new_runs])


def check_not_declined(blind_runs: Sequence[Run], right_JN: np.ndarray) -> None:
    """Raises ContractError for a blind log that is right on less than FEWEST questions: nothing
    tells it from one whose model declines to answer, although it may know."""
    for run, right_N in zip(blind_runs, right_JN, strict=True):
        right = int(right_N.sum())
        if right < FEWEST:
            raise ContractError(
                f"the blind log of {run.model or 'a model'} is right on {right} of {len(right_N)} "
                "questions, which tells nothing about the others; does it decline to answer?"
            )


def part_weights(
    solved_N: np.ndarray,
    chance_N: np.ndarray,
    logs: int,
    is_yes_N: np.ndarray | None = None,
    *,
    least_chance_N: np.ndarray | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(N,) weights of the questions in both readings of each part; see the file's beginning.
    ``is_yes_N``: booleans, of a benchmark of yes-or-no questions. If the chance of guessing is not
    known exactly, ``chance_N`` is the most that it may be, ``least_chance_N`` the least: luck is
    then assumed to solve the most, and to hide the fewest misses.

    ``caught``: a question that one of the models can solve is missed by that model's log with the
    probability MISSED, and then guessed by none of the others."""
    if least_chance_N is None:
        least_chance_N = chance_N
    solved_N = solved_N.astype(float)
    luck_N = 1 - (1 - chance_N) ** logs
    caught_N = 1 - MISSED * (1 - least_chance_N) ** (logs - 1)
    # with two options and many logs, everything is solved by luck
    is_certain_N = luck_N > 1 - 1e-9
    luck_N = np.where(is_certain_N, 0.0, luck_N)
    really_solved_N = np.where(is_certain_N, 0.0, (solved_N - luck_N) / (1 - luck_N))
    weights = {
        SOLVED: (solved_N, really_solved_N),
        EYES: (1 - solved_N, caught_N - solved_N),
    }
    if is_yes_N is None:
        return weights
    return {
        name: (balanced(plain_N, is_yes_N), balanced(really_N, is_yes_N))
        for name, (plain_N, really_N) in weights.items()
    }


def balanced(weight_N: np.ndarray, is_yes_N: np.ndarray) -> np.ndarray:
    """The weights, with the share of yes and of no that these have of all questions; all 0 if
    one of them has no weight."""
    result_N = np.zeros(len(weight_N))
    for members in (is_yes_N, ~is_yes_N):
        if not members.any():
            continue
        total = float(weight_N[members].sum())
        if total <= 0:
            return np.zeros(len(weight_N))
        result_N[members] = weight_N[members] * members.sum() / total
    return result_N


def are_yes(run: Run) -> np.ndarray | None:
    """(N,) booleans, whether the truth is yes; None if it is neither yes nor no of some
    question."""
    truths = [yes_or_no(item) for item in run.items]
    if not all(truths):
        return None
    return np.array([truth == "yes" for truth in truths])


def part_of(
    name: str,
    base_MN: np.ndarray,
    new_MN: np.ndarray,
    clusters: list[str],
    weights: Sequence[np.ndarray],
    *,
    level: float,
    pair_runs: bool = False,
    questions: int | None = None,
) -> Part:
    """One part of a difference, of the scores of M runs a side on N questions. Its group are the
    ``questions`` with a weight in the first reading, all of which is 0 where yes and no cannot be
    balanced."""
    group_N = weights[0]
    if questions is None:
        questions = int((group_N > 0).sum())
    has_mean = bool(group_N.sum() > 0)
    base = new = 0.0
    if has_mean:
        base = 100 * float(np.average(base_MN.mean(axis=0), weights=group_N))
        new = 100 * float(np.average(new_MN.mean(axis=0), weights=group_N))
    part = Part(
        name=name,
        questions=questions,
        has_mean=has_mean,
        base=base,
        new=new,
        readings=(),
        p=1.0,
        p_holm=1.0,
        interval=(-100.0, 100.0),
        level=level,
    )
    # a reading in which the group has no questions says nothing
    if questions < FEWEST or any(weight_N.sum() <= 0 for weight_N in weights):
        return part
    readings = []
    for weight_N in weights:
        base_statistics = [weighted_mean(score_N, weight_N) for score_N in base_MN]
        new_statistics = [weighted_mean(score_N, weight_N) for score_N in new_MN]
        paired = pair(base_statistics, new_statistics, clusters)
        readings.append(compare(paired, level=level, pair_runs=pair_runs))
    return replace(part, readings=tuple(readings), p=p_of_all(readings))


def weighted_mean(score_N: np.ndarray, weight_N: np.ndarray) -> Statistic:
    """The weighted mean in percent; questions without a weight do not count."""
    sums = np.stack([weight_N * score_N, weight_N], axis=1)
    return Statistic(
        sums,
        lambda totals: 100 * ratio(totals[..., 0], totals[..., 1]),
        counted=weight_N != 0,
    )


def p_of_all(readings: Sequence[Difference]) -> float:
    """The p-value of differences that must all be shown, in one direction."""
    if len({np.sign(reading.difference) for reading in readings}) > 1:
        return 1.0
    return max(reading.p for reading in readings)


def adjusted_parts(parts: Sequence[Part]) -> list[Part]:
    """The parts with Holm's p-values over all of them, and the intervals that go with these."""
    values = [part.p for part in parts]
    adjusted = []
    for part, p, factor in zip(parts, holm(values), holm_factors(values), strict=True):
        interval = part.interval
        if part.readings:
            level = 1 - (1 - part.level) / factor
            ends = [reading.interval(level) for reading in part.readings]
            interval = (min(low for low, _ in ends), max(high for _, high in ends))
        adjusted.append(replace(part, p_holm=p, interval=interval))
    return adjusted
