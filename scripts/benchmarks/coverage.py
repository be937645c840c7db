"""Do the intervals and verdicts of ``llm2clip compare`` hold what they promise? Simulated models
whose true difference is known; 43 settings, 1,000 simulations each.

    python -m scripts.benchmarks.coverage

``covered``: how many of the 95 % intervals hold the true difference. ``wrong verdicts``: how often
a difference is shown (adjusted p below .05) where there is none; with several comparisons, how
often at least one is. The standard error of a share of 5 % is 0.7 points.
"""

import argparse
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import (
    Statistic,
    mean_of_parts,
    mean_statistic,
    ratio,
)
from llava_integration.evaluator.compare.multiplicity import holm, holm_factors
from llava_integration.evaluator.compare.statistics import (
    Difference,
    Paired,
    compare,
    pair,
)

Rng = np.random.Generator
LEVEL = 0.95
# comparisons that are adjusted together, and the truth
Drawn = tuple[list[Paired], list[float]]


@dataclass(frozen=True)
class Setting:
    """A kind of comparison, and how one is drawn."""

    name: str
    draw: Callable[[Rng], Drawn]
    pair_runs: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the simulations of a setting gave."""

    covered: float  # share of intervals with the truth
    wrong_verdicts: float | None  # None: no comparison without a difference
    width: float  # mean width of the intervals, in points


def simulate(setting: Setting, simulations: int) -> Outcome:
    """The outcome of so many simulations; their seed is of the setting's name."""
    rng = np.random.default_rng(zlib.crc32(setting.name.encode()))
    covered = []
    wrong = []
    widths = []
    for _ in range(simulations):
        comparisons, truths = setting.draw(rng)
        results = []
        for paired in comparisons:
            result = compare(paired, level=LEVEL, pair_runs=setting.pair_runs)
            results.append(result)
        intervals = adjusted_intervals(results)
        adjusted = holm([result.p for result in results])
        holds = []
        significant = []
        for (low, high), p, truth in zip(intervals, adjusted, truths, strict=True):
            holds.append(low - 1e-9 <= truth <= high + 1e-9)
            widths.append(high - low)
            if truth == 0:
                significant.append(p < 1 - LEVEL)
        covered.append(all(holds))
        if significant:
            wrong.append(any(significant))
    return Outcome(
        covered=float(np.mean(covered)),
        wrong_verdicts=float(np.mean(wrong)) if wrong else None,
        width=float(np.mean(widths)),
    )


def adjusted_intervals(results: Sequence[Difference]) -> list[tuple[float, float]]:
    """The intervals that tables show, adjusted as the p-values are."""
    factors = holm_factors([result.p for result in results])
    intervals = []
    for result, factor in zip(results, factors, strict=True):
        level = 1 - (1 - LEVEL) / factor
        intervals.append(result.estimate.interval(level))
    return intervals


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def comparison_of_means(
    base: np.ndarray, new: np.ndarray, clusters: list[str], truth: float
) -> Drawn:
    """One comparison of mean scores, one run a side."""
    base_mean = mean_statistic(base.tolist())
    new_mean = mean_statistic(new.tolist())
    return [pair([base_mean], [new_mean], clusters)], [100 * truth]


def changes(questions: int, won: float, lost: float) -> Setting:
    """Right or wrong, of which new wins and loses these shares."""

    def draw(rng: Rng) -> Drawn:
        luck = rng.random(questions)
        wins = luck < won
        losses = luck > 1 - lost
        both_right = rng.random(questions) < 0.6
        base = np.where(wins, 0.0, np.where(losses, 1.0, both_right))
        new = np.where(wins, 1.0, np.where(losses, 0.0, both_right))
        return comparison_of_means(base, new, names(questions), won - lost)

    return Setting(f"{questions} questions, {won:.0%} won, {lost:.0%} lost", draw)


def scores(
    name: str, questions: int, sample: Callable[[Rng, int], np.ndarray], mean: float
) -> Setting:
    """Differences between partial scores."""

    def draw(rng: Rng) -> Drawn:
        base = np.zeros(questions)
        new = sample(rng, questions)
        return comparison_of_means(base, new, names(questions), mean)

    return Setting(f"{questions} questions, {name}", draw)


def partly_tied(rng: Rng, questions: int, tied: float) -> np.ndarray:
    """Differences that are 0 of this share of the questions, else from 0 to 1."""
    is_tied = rng.random(questions) < tied
    return np.where(is_tied, 0.0, rng.random(questions))


def mean_statistics(right_MN: np.ndarray) -> list[Statistic]:
    """The mean of every run."""
    return [mean_statistic(run.astype(float).tolist()) for run in right_MN]


def clustered(
    name: str,
    sizes: Sequence[int],
    shared: float,
    won: float = 0.25,
    lost: float = 0.25,
) -> Setting:
    """Right or wrong; a question shares its image's fate with the probability ``shared``."""
    clusters = np.repeat(names(len(sizes)), sizes).tolist()
    image_N = np.repeat(np.arange(len(sizes)), sizes)

    def draw(rng: Rng) -> Drawn:
        own_chance = rng.random(len(image_N))
        fate = rng.random(len(sizes))[image_N]
        luck = np.where(rng.random(len(image_N)) < shared, fate, own_chance)
        new = np.where(luck < won, 1.0, np.where(luck > 1 - lost, 0.0, 0.5))
        return comparison_of_means(1 - new, new, clusters, won - lost)

    return Setting(name, draw)


def categories(sizes: Sequence[int]) -> Setting:
    """Right or wrong; the number is the mean of categories of these sizes."""
    parts = np.repeat(names(len(sizes)), sizes).tolist()

    def draw(rng: Rng) -> Drawn:
        right = rng.random((2, len(parts))) < 0.6
        base, new = right.astype(float).tolist()
        base_mean = mean_of_parts(parts, base, 100.0)
        new_mean = mean_of_parts(parts, new, 100.0)
        return [pair([base_mean], [new_mean], names(len(parts)))], [0.0]

    *first, last = map(str, sizes)
    listed = f"{', '.join(first)} and {last}"
    return Setting(f"mean of categories of {listed} questions", draw)


def f1_statistic(said: np.ndarray, truth: np.ndarray) -> Statistic:
    """F1 of yes, in percent."""
    sums = np.stack([said * truth, said, truth], axis=1)

    def f1_of(totals: np.ndarray) -> np.ndarray:
        hits = totals[..., 0]
        return 100 * ratio(2 * hits, totals[..., 1] + totals[..., 2])

    return Statistic(sums, f1_of)


def f1(
    images: int,
    positives: int,
    negatives: int,
    base: tuple[float, float],
    new: tuple[float, float],
) -> Setting:
    """F1 of yes-or-no questions; ``base``, ``new``: rates of yes where it is true, and not."""
    truth = np.tile(np.repeat([1.0, 0.0], [positives, negatives]), images)
    clusters = np.repeat(names(images), positives + negatives).tolist()

    def true_f1(rates: tuple[float, float]) -> float:
        true_rate, false_rate = rates
        hits = true_rate * positives
        said = hits + false_rate * negatives
        return 100 * 2 * hits / (said + positives)

    def draw_side(
        rng: Rng, rates: tuple[float, float], shared: np.ndarray
    ) -> Statistic:
        is_shared = rng.random(len(truth)) < 0.7
        luck = np.where(is_shared, shared, rng.random(len(truth)))
        said = luck < np.where(truth == 1, *rates)
        return f1_statistic(said.astype(float), truth)

    def draw(rng: Rng) -> Drawn:
        shared = rng.random(len(truth))
        base_f1 = draw_side(rng, base, shared)
        new_f1 = draw_side(rng, new, shared)
        return [pair([base_f1], [new_f1], clusters)], [true_f1(new) - true_f1(base)]

    questions = positives + negatives
    share = positives / questions
    return Setting(f"F1, {images} images of {questions}, {share:.0%} yes", draw)


def runs(
    base: int, new: int, questions: int, spread: float, gain: float = 0.0
) -> Setting:
    """Right or wrong; each side knows half of the questions, a run's accuracy varies by ``spread``
    points."""

    def draw_side(rng: Rng, count: int, more: float) -> list[Statistic]:
        knows = rng.random(questions) < 0.5
        chance = np.where(knows, 0.75, 0.25) + more
        luck = rng.normal(0, spread / 100, size=(count, 1))
        right = rng.random((count, questions)) < chance + luck
        return mean_statistics(right)

    def draw(rng: Rng) -> Drawn:
        base_runs = draw_side(rng, base, 0.0)
        new_runs = draw_side(rng, new, gain / 100)
        return [pair(base_runs, new_runs, names(questions))], [gain]

    varying = f"vary by {spread:g} points" if spread else "do not vary"
    return Setting(f"{base} and {new} runs that {varying}, {questions} questions", draw)


def paired_runs(count: int, questions: int, shared: float, own: float) -> Setting:
    """Right or wrong; a seed moves the accuracy of both sides by ``shared`` points, and that of
    each by ``own`` more."""

    def draw(rng: Rng) -> Drawn:
        of_seed = rng.normal(0, shared / 100, size=(count, 1))
        sides = []
        for _ in range(2):
            chance = np.where(rng.random(questions) < 0.5, 0.75, 0.25)
            luck = of_seed + rng.normal(0, own / 100, size=(count, 1))
            right = rng.random((count, questions)) < chance + luck
            sides.append(mean_statistics(right))
        return [pair(sides[0], sides[1], names(questions))], [0.0]

    apart = f" and {own:g} apart" if own else ""
    name = (
        f"{count} paired runs that vary by {shared:g} points together{apart}, "
        f"{questions} questions"
    )
    return Setting(name, draw, pair_runs=True)


def tiers(models: int, questions: int, gain: float) -> Setting:
    """Every two of ``models``, the second half of which is better by ``gain`` points."""

    def draw(rng: Rng) -> Drawn:
        chance = rng.uniform(0.2, 0.7, size=questions)
        better = np.repeat([0.0, gain / 100], [models // 2, models - models // 2])
        right = rng.random((models, questions)) < chance + better[:, None]
        statistics = mean_statistics(right)
        comparisons = []
        truths = []
        for base, new in combinations(range(models), 2):
            sides = ([statistics[base]], [statistics[new]])
            comparisons.append(pair(*sides, names(questions)))
            truths.append(100 * float(better[new] - better[base]))
        return comparisons, truths

    name = (
        f"all pairs of {models} models, half better by {gain:g}, {questions} questions"
    )
    return Setting(name, draw)


def all_pairs(models: int, questions: int, count: int = 1) -> Setting:
    """Every two of ``models`` that are equally good, adjusted together."""

    def draw(rng: Rng) -> Drawn:
        chance = rng.uniform(0.2, 0.8, size=questions)
        right = rng.random((models, count, questions)) < chance
        runs_of_models = [mean_statistics(of_model) for of_model in right]
        comparisons = []
        for base, new in combinations(runs_of_models, 2):
            comparisons.append(pair(base, new, names(questions)))
        return comparisons, [0.0] * len(comparisons)

    more = f", {count} runs each" if count > 1 else ""
    return Setting(f"all pairs of {models} models, {questions} questions{more}", draw)


def settings() -> list[Setting]:
    """The settings of the table."""
    return [
        changes(10, 0.3, 0.3),
        changes(10, 0.3, 0.1),
        changes(30, 0.02, 0.0),
        changes(30, 0.01, 0.01),
        changes(30, 0.2, 0.1),
        changes(30, 0.97, 0.0),
        changes(100, 0.03, 0.01),
        changes(100, 0.05, 0.05),
        changes(300, 0.03, 0.01),
        changes(300, 0.15, 0.15),
        scores("nine in ten tied", 50, lambda rng, n: partly_tied(rng, n, 0.9), 0.05),
        scores("half tied", 30, lambda rng, n: partly_tied(rng, n, 0.5), 0.25),
        scores("skewed", 30, lambda rng, n: rng.beta(0.5, 5, n), 0.5 / 5.5),
        scores("normal", 10, lambda rng, n: rng.normal(0, 0.1, n), 0.0),
        clustered("40 images of 12", [12] * 40, 0.3),
        clustered("5 images of 100, 100 of 2", [100] * 5 + [2] * 100, 0.3),
        clustered("3 images of 50, 30 of 2", [50] * 3 + [2] * 30, 0.3, 0.3, 0.2),
        categories([5, 100]),
        categories([1, 100]),
        categories([2, 500]),
        categories([4, 200]),
        categories([3, 3, 3, 50]),
        f1(50, 3, 3, (0.7, 0.3), (0.8, 0.25)),
        f1(60, 1, 9, (0.6, 0.05), (0.6, 0.05)),
        runs(2, 2, 30, 0.0),
        runs(2, 2, 30, 3.0),
        runs(2, 2, 300, 0.0),
        runs(2, 2, 300, 3.0),
        runs(3, 3, 10, 0.0),
        runs(3, 3, 100, 2.0, gain=5.0),
        runs(1, 3, 100, 2.0),
        runs(1, 3, 300, 5.0),
        runs(2, 8, 300, 5.0),
        runs(8, 8, 300, 0.0),
        runs(8, 8, 300, 3.0),
        paired_runs(3, 300, 3.0, 0.0),
        paired_runs(3, 300, 3.0, 2.0),
        paired_runs(8, 300, 3.0, 0.0),
        paired_runs(8, 100, 3.0, 2.0),
        all_pairs(4, 100),
        all_pairs(6, 200),
        tiers(6, 300, 15.0),
        all_pairs(3, 100, count=3),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--simulations", type=int, default=1000)
    args = parser.parse_args()
    print("| setting | covered | wrong verdicts | mean width |")
    print("|---|--:|--:|--:|")
    for setting in settings():
        outcome = simulate(setting, args.simulations)
        wrong = ""
        if outcome.wrong_verdicts is not None:
            wrong = f"{outcome.wrong_verdicts:.1%}"
        columns = [
            setting.name,
            f"{outcome.covered:.1%}",
            wrong,
            f"{outcome.width:.2f}",
        ]
        print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
