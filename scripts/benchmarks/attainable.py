"""How near to 95 % can an interval be at all? Two limits on what ``coverage`` measures.

    python -m scripts.benchmarks.attainable

First, right or wrong on few questions: wins and losses have few possible values. ``ours``: exact
coverage of the 95 % interval, summed over all numbers of wins and losses. ``exact test``: that of
the test with the same statistic that rejects as often as it may: in at most 5 %, whatever share of
the questions is won and lost. Where both are equal, no other critical value comes nearer.

Second, few runs: a linear program over all tests of a difference X, given the variance V between
runs, that reject more where X is larger or V is smaller, never within 1.96 standard errors of runs
that do not vary, and never more than 5 %, however much runs vary (the same on both sides). It gives
how often such a test can reject if runs do not vary.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import mean_statistic
from llava_integration.evaluator.compare.estimate import Estimate
from llava_integration.evaluator.compare.statistics import compare, pair

LEVEL = 0.95
SIZE = 1 - LEVEL
# questions, share won, share lost: those of ``coverage`` with at most 100 questions
RIGHT_OR_WRONG = (
    (10, 0.3, 0.3),
    (10, 0.3, 0.1),
    (30, 0.02, 0.0),
    (30, 0.01, 0.01),
    (30, 0.2, 0.1),
    (30, 0.97, 0.0),
    (100, 0.03, 0.01),
    (100, 0.05, 0.05),
)
# shares that are lost, of which the least favorable one counts
NUISANCE = 400
# of the linear program
CELLS = 60
SPREADS = (0.0, *np.geomspace(0.03, 3000, 37))  # extra variance of a run, by its slips
NEVER = 1.96  # standard errors


def outcomes(questions: int) -> np.ndarray:
    """(O, 2) all numbers of wins and losses."""
    pairs = []
    for wins in range(questions + 1):
        for losses in range(questions + 1 - wins):
            pairs.append((wins, losses))
    return np.array(pairs)


def probabilities(
    outcome_O2: np.ndarray, questions: int, won: float, lost: float
) -> np.ndarray:
    """(O,) of the multinomial distribution."""
    wins_O, losses_O = outcome_O2.T
    ties_O = questions - wins_O - losses_O
    factorials = np.array([math.lgamma(count + 1) for count in range(questions + 1)])
    log_O = factorials[questions] - factorials[wins_O] - factorials[losses_O]
    log_O -= factorials[ties_O]
    for count_O, share in ((wins_O, won), (losses_O, lost), (ties_O, 1 - won - lost)):
        log_O = log_O + count_O * math.log(max(share, 1e-300))
    return np.exp(log_O)


def estimates(outcome_O2: np.ndarray, questions: int) -> list[Estimate]:
    """What ``compare`` makes of each outcome."""
    names = [str(number) for number in range(questions)]
    results = []
    for wins, losses in outcome_O2:
        base = np.zeros(questions)
        new = np.zeros(questions)
        new[:wins] = 1
        base[wins : wins + losses] = 1
        sides = ([mean_statistic(base.tolist())], [mean_statistic(new.tolist())])
        results.append(compare(pair(*sides, names)).estimate)
    return results


def p_of(estimate: Estimate, difference: float) -> float:
    """p of the test that this is the true difference."""
    moved = {**vars(estimate), "center": estimate.center - difference}
    return Estimate(**moved).p()


def right_or_wrong(questions: int, won: float, lost: float) -> tuple[float, float]:
    """Coverage of our interval, and of the exact test with the same statistic."""
    outcome_O2 = outcomes(questions)
    truth = won - lost
    p_O = np.array(
        [p_of(estimate, 100 * truth) for estimate in estimates(outcome_O2, questions)]
    )
    true_O = probabilities(outcome_O2, questions, won, lost)
    ours = float(true_O[p_O >= SIZE].sum())
    # the smallest p first: how often it, or a smaller one, comes up at the least favorable share
    order = np.argsort(p_O, kind="stable")
    largest_O = np.zeros(len(order))
    for share in np.linspace(1e-5, (1 - truth) / 2 - 1e-9, NUISANCE):
        of_share_O = probabilities(outcome_O2, questions, share + truth, share)
        largest_O = np.maximum(largest_O, np.cumsum(of_share_O[order]))
    is_last_O = np.append(np.diff(p_O[order]) > 1e-12, True)
    rejected = np.flatnonzero(is_last_O & (largest_O <= SIZE))
    count = int(rejected[-1]) + 1 if len(rejected) else 0
    return ours, 1 - float(true_O[order[:count]].sum())


def few_runs(runs: int, images: float) -> float:
    """How often a test can show a difference where there is none and ``runs`` runs a side do not
    vary. ``images``: variance over images that all runs share, by that of a run's slips."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix, vstack
    from scipy.stats import chi2

    freedom = 2 * (runs - 1)
    cdf = np.vectorize(NormalDist().cdf)
    error = math.sqrt(2 / runs * (1 + images))  # if runs do not vary
    difference_X = np.geomspace(1, 400, CELLS)
    variance_V = np.array([0, *np.geomspace(0.02, 3e4, CELLS - 1), np.inf])
    sizes = []
    for spread in SPREADS:
        true_error = math.sqrt(2 / runs * (1 + images + spread))
        above_X = 2 * (1 - cdf(difference_X * error / true_error))
        in_cell_X = above_X - np.append(above_X[1:], 0)
        below_V = chi2.cdf(variance_V * freedom / (1 + spread), freedom)
        sizes.append(np.outer(in_cell_X, np.diff(below_V)).ravel())
    cell_XV = np.arange(CELLS * CELLS).reshape(CELLS, CELLS)
    # of these the second rejects at least as often as the first
    larger_difference = np.stack([cell_XV[:-1].ravel(), cell_XV[1:].ravel()])
    smaller_variance = np.stack([cell_XV[:, 1:].ravel(), cell_XV[:, :-1].ravel()])
    ordered = np.concatenate([larger_difference, smaller_variance], axis=1)
    count = ordered.shape[1]
    values = np.repeat([1.0, -1.0], count)
    rows = np.tile(np.arange(count), 2)
    monotone = csr_matrix((values, (rows, ordered.ravel())), (count, CELLS * CELLS))
    most_X = (difference_X >= NEVER).astype(float)
    solution = linprog(
        -sizes[0],
        A_ub=vstack([csr_matrix(np.array(sizes)), monotone]),
        b_ub=np.concatenate([np.full(len(sizes), SIZE), np.zeros(count)]),
        bounds=[(0, most) for most in np.repeat(most_X, CELLS)],
    )
    return -float(solution.fun)


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args(argv)
    print("| setting | ours | exact test |\n|---|--:|--:|")
    for questions, won, lost in RIGHT_OR_WRONG:
        ours, exact = right_or_wrong(questions, won, lost)
        name = f"{questions} questions, {won:.0%} won, {lost:.0%} lost"
        print(f"| {name} | {ours:.1%} | {exact:.1%} |", flush=True)
    print(
        "\n| runs a side that do not vary | images | covered, at least |\n|---|--:|--:|"
    )
    for runs in (2, 3, 8):
        for images in (0.1, 0.67, 3.0):
            covered = 1 - few_runs(runs, images)
            print(f"| {runs} | {images:g} | {covered:.1%} |", flush=True)


if __name__ == "__main__":
    main()
