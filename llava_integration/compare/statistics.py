"""Paired statistics of two models on the same questions, several questions an image, one or several runs a side.

Shapes: C clusters (images), K sums of a statistic, M runs, R resamples.

The unit of chance is the image: questions of one image are drawn together. A resample gives every cluster a weight,
the weighted sums give the headline number of both sides, composites included, so that what is resampled is what is
published.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from llava_integration.benchmarks.base import Statistic

BLOCK = 1 << 22  # weights made at a time: 32 MiB
NORMAL = NormalDist()


@dataclass(frozen=True)
class Paired:
    """Sums by cluster of every run of both sides, on the same questions."""

    base: np.ndarray  # (M_base, C, K)
    new: np.ndarray  # (M_new, C, K)
    statistic: Statistic  # for its value function
    strata: np.ndarray  # (C,) integers; clusters are drawn within theirs

    @property
    def clusters(self) -> int:
        """Images."""
        return self.base.shape[1]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """New minus base, in the statistic's unit, and how sure it is."""

    base: float
    new: float
    difference: float
    low: float
    high: float
    standard_error: float  # over images, and over runs where there are several
    p: float
    test: str  # which test p is of
    detectable: float  # a true difference of this size would be found 4 times in 5
    spread_base: float  # standard deviation over runs; 0 with one run
    spread_new: float


def by_cluster(sums: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Sums over the questions of each cluster: (questions, K) and cluster numbers -> (C, K)."""
    total = np.zeros((count, sums.shape[1]))
    np.add.at(total, codes, sums)
    return total


def pair(base: list[Statistic], new: list[Statistic], clusters: list[str]) -> Paired:
    """Gather the statistics of both sides' runs over the same questions in the same order.

    Questions that count in no run are left out, so that they are no images of the resampling.
    """
    keep = counted([*base, *new])
    clusters = [name for name, kept in zip(clusters, keep, strict=True) if kept]
    names = sorted(set(clusters))
    number = {name: place for place, name in enumerate(names)}
    codes = np.array([number[name] for name in clusters])
    strata = np.zeros(len(names), dtype=int)
    if base[0].strata is not None:
        strata[codes] = base[0].strata[keep]
    gather = [np.stack([by_cluster(run.sums[keep], codes, len(names)) for run in side]) for side in (base, new)]
    return Paired(gather[0], gather[1], base[0], strata)


def counted(runs: list[Statistic]) -> np.ndarray:
    """(questions,) booleans: which questions count in at least one run."""
    return np.any([np.ones(len(run.sums), bool) if run.counted is None else run.counted for run in runs], axis=0)


def weights(strata: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Bootstrap weights in blocks (r, C): how often each cluster was drawn, drawing within strata."""
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, BLOCK // len(strata)))
        block = np.zeros((rows, len(strata)))
        for member in members:
            drawn = rng.integers(0, len(member), size=(rows, len(member)))
            drawn += np.arange(rows)[:, None] * len(member)
            block[:, member] = np.bincount(drawn.ravel(), minlength=rows * len(member)).reshape(rows, -1)
        yield block
        done += rows


def bootstrap(paired: Paired, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Differences (R,) of resampled clusters; a side of several runs is their mean."""
    draws = []
    for block in weights(paired.strata, resamples, rng):
        base, new = (
            np.mean([paired.statistic.value(block @ run) for run in side], axis=0) for side in (paired.base, paired.new)
        )
        draws.append(new - base)
    return np.concatenate(draws)


def permutation_p(paired: Paired, observed: float, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p: how often the difference is as large when base and new are swapped at random, image by image."""
    base, new = paired.base[0], paired.new[0]
    step = new - base
    if not step.any():
        return 1.0
    extreme = done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, BLOCK // len(step)))
        swapped = rng.integers(0, 2, size=(rows, len(step))).astype(float) @ step
        moved = paired.statistic.value(new.sum(axis=0) - swapped) - paired.statistic.value(base.sum(axis=0) + swapped)
        extreme += int(np.sum(np.abs(moved) >= abs(observed) - 1e-9))
        done += rows
    return (1 + extreme) / (1 + resamples)


def compare(paired: Paired, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Difference:
    """Estimate, interval and p-value of new minus base.

    One run a side: the interval is the expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69):
    percentiles of the resampled differences at levels that make up for few images (Student's t, and n - 1 for n); p is
    of a permutation over images. Several runs: the variance between runs is added to that over images, and interval
    and p are Student's with Welch and Satterthwaite's degrees of freedom.
    """
    rng = np.random.default_rng(seed)
    values = [
        np.array([float(paired.statistic.value(run.sum(axis=0))) for run in side]) for side in (paired.base, paired.new)
    ]
    base, new = (float(side.mean()) for side in values)
    draws = bootstrap(paired, resamples, rng)
    freedom = max(1, paired.clusters - len(np.unique(paired.strata)))
    widen = math.sqrt(paired.clusters / freedom) if paired.clusters > 1 else 1.0
    error = widen * float(np.std(draws))
    spreads = [float(np.std(side, ddof=1)) if len(side) > 1 else 0.0 for side in values]
    if max(map(len, values)) == 1:
        tail = NORMAL.cdf(-widen * t_quantile(0.5 + level / 2, freedom))
        low, high = (float(value) for value in np.quantile(draws, [tail, 1 - tail]))
        p, test = permutation_p(paired, new - base, resamples, rng), "permutation over images"
    else:
        error, freedom = _add_runs(error, freedom, values)
        reach = t_quantile(0.5 + level / 2, freedom) * error
        low, high = new - base - reach, new - base + reach
        p, test = t_test_p(new - base, error, freedom), "t over images and runs"
    return Difference(
        base=base,
        new=new,
        difference=new - base,
        low=low,
        high=high,
        standard_error=error,
        p=p,
        test=test,
        detectable=(NORMAL.inv_cdf(0.5 + level / 2) + NORMAL.inv_cdf(0.8)) * error,
        spread_base=spreads[0],
        spread_new=spreads[1],
    )


def _add_runs(error: float, freedom: int, values: list[np.ndarray]) -> tuple[float, int]:
    """Standard error and degrees of freedom with the variance between runs; a lone run varies as the others do."""
    seen = [float(np.var(side, ddof=1)) for side in values if len(side) > 1]
    between = [float(np.var(side, ddof=1)) if len(side) > 1 else seen[0] for side in values]
    parts = [(error**2, freedom)]
    parts += [(variance / len(side), max(1, len(side) - 1)) for variance, side in zip(between, values, strict=True)]
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / degrees for variance, degrees in parts)
    return math.sqrt(total), max(1, int(total**2 / below)) if below else freedom


@cache
def t_quantile(level: float, freedom: int) -> float:
    """Student's quantile, by bisection of its distribution; the normal one beyond 2000 degrees."""
    if freedom > 2000:
        return NORMAL.inv_cdf(level)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, freedom: int) -> float:
    """Student's distribution function of whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = 1.0, 1.0
    if freedom % 2:
        if freedom == 1:
            return 0.5 + angle / math.pi
        term = total = cosine
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return 0.5 + (angle + sine * total) / math.pi
    for k in range(2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 0.5 + sine * total / 2


def t_test_p(estimate: float, error: float, freedom: int) -> float:
    """Two-sided p of an estimate with a standard error."""
    if error == 0:
        return 1.0 if estimate == 0 else 0.0
    return 2 * (1 - t_cdf(abs(estimate) / error, freedom))


def mcnemar_p(only_base: int, only_new: int) -> float:
    """Exact two-sided McNemar p from the questions that one side alone gets right; blind to images in common."""
    total, fewer = only_base + only_new, min(only_base, only_new)
    if total == 0:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * sum(math.exp(value - total * math.log(2)) for value in logs))


def holm(values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted, running = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = running
    return adjusted
