"""Paired statistics of two models on the same questions: several questions per image, one or several runs per side.

Shapes: N questions, C clusters (images), K sums of a statistic, M runs, R resamples.

Images are drawn, not questions. A resample gives every image a weight, and the weighted sums give the headline number
of both sides, composites included: what is resampled is what is published.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_integration.benchmarks.benchmark import Statistic
from llm2clip_plugin.bootstrap import (
    BLOCK,
    NORMAL,
    cluster_codes,
    cluster_sums,
    expansion,
    percentile_interval,
    resample,
    t_cdf,
    t_quantile,
)


@dataclass(frozen=True)
class Paired:
    """Sums by cluster of every run of both sides, on the same questions."""

    base: np.ndarray  # (M_base, C, K)
    new: np.ndarray  # (M_new, C, K)
    statistic: Statistic  # for its value function
    strata: np.ndarray  # (C,) integers; clusters are drawn within their stratum

    @property
    def clusters(self) -> int:
        """C, the number of images."""
        return self.base.shape[1]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """New minus base, in the statistic's unit, with its uncertainty."""

    base: float
    new: float
    difference: float
    low: float
    high: float
    standard_error: float  # over images, and over runs where there are several
    p: float
    test: str  # the test that p comes from
    detectable: float  # the true difference that is detected with 80 % power
    spread_base: float  # standard deviation over runs; 0 with one run
    spread_new: float


def pair(base: list[Statistic], new: list[Statistic], clusters: list[str]) -> Paired:
    """Sums by cluster of both sides' runs, which have the same questions in the same order.

    Questions that count in no run are left out, so that their images are not drawn.
    """
    counted_N = counted([*base, *new])
    code_N, count = cluster_codes([name for name, counts in zip(clusters, counted_N, strict=True) if counts])
    stratum_C = np.zeros(count, dtype=int)
    if base[0].strata is not None:
        stratum_C[code_N] = base[0].strata[counted_N]
    base_MCK, new_MCK = (
        np.stack([cluster_sums(run.sums[counted_N], code_N, count) for run in side]) for side in (base, new)
    )
    return Paired(base_MCK, new_MCK, base[0], stratum_C)


def counted(runs: list[Statistic]) -> np.ndarray:
    """(N,) booleans: the questions that count in at least one run."""
    return np.any([np.ones(len(run.sums), bool) if run.counted is None else run.counted for run in runs], axis=0)


def resampled_values(paired: Paired, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(2, R) values of base and new on the same resampled images; a side of several runs is their mean."""
    blocks = [
        [
            np.mean([paired.statistic.value(weight_RC @ run_CK) for run_CK in side], axis=0)
            for side in (paired.base, paired.new)
        ]
        for weight_RC in resample(paired.strata, resamples, rng)
    ]
    return np.concatenate(blocks, axis=1)


def permutation_p(paired: Paired, observed: float, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p: how often the difference is as large when base and new are swapped at random, image by image."""
    base_CK, new_CK = paired.base[0], paired.new[0]
    step_CK = new_CK - base_CK
    if not step_CK.any():
        return 1.0
    value = paired.statistic.value
    extreme = done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, BLOCK // len(step_CK)))
        swapped_RK = rng.integers(0, 2, size=(rows, len(step_CK))).astype(float) @ step_CK
        moved_R = value(new_CK.sum(axis=0) - swapped_RK) - value(base_CK.sum(axis=0) + swapped_RK)
        extreme += int(np.sum(np.abs(moved_R) >= abs(observed) - 1e-9))
        done += rows
    return (1 + extreme) / (1 + resamples)


def compare(paired: Paired, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Difference:
    """Estimate, interval and p-value of new minus base.

    One run per side: the interval is ``percentile_interval`` of the resampled differences, p is from a permutation over
    images. Several runs: the variance between runs is added to the variance over images, and interval and p are
    Student's with Welch and Satterthwaite's degrees of freedom.
    """
    rng = np.random.default_rng(seed)
    values = [
        np.array([float(paired.statistic.value(run.sum(axis=0))) for run in side]) for side in (paired.base, paired.new)
    ]
    base, new = (float(side.mean()) for side in values)
    base_R, new_R = resampled_values(paired, resamples, rng)
    difference_R = new_R - base_R
    freedom = max(1, paired.clusters - len(np.unique(paired.strata)))
    error = expansion(paired.clusters, freedom) * float(np.std(difference_R))
    spreads = [float(np.std(side, ddof=1)) if len(side) > 1 else 0.0 for side in values]
    if max(map(len, values)) == 1:
        low, high = percentile_interval(difference_R, paired.clusters, freedom, level)
        p, test = permutation_p(paired, new - base, resamples, rng), "permutation over images"
    else:
        error, freedom = _add_runs(error, freedom, values)
        reach = t_quantile(0.5 + level / 2, freedom) * error
        low, high = new - base - reach, new - base + reach
        p, test = float(new == base), "t over images and runs"
        if error > 0:
            p = 2 * (1 - t_cdf(abs(new - base) / error, freedom))
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
    """Standard error and degrees of freedom with the variance between runs; a single run gets the other side's."""
    known = [float(np.var(side, ddof=1)) for side in values if len(side) > 1]
    between = [float(np.var(side, ddof=1)) if len(side) > 1 else known[0] for side in values]
    parts = [(error**2, freedom)]
    parts += [(variance / len(side), max(1, len(side) - 1)) for variance, side in zip(between, values, strict=True)]
    return combine(parts)


def combine(parts: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Standard error and Satterthwaite's degrees of freedom of a sum of variances, each with its own."""
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / degrees for variance, degrees in parts)
    return math.sqrt(total), max(1, int(total**2 / below)) if below else parts[0][1]


def holm(values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted, running = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = running
    return adjusted
