"""Paired statistics of two models on the same questions: several questions per image, one or
several runs per side.

Shapes: N questions, C clusters (images), K sums of a statistic, M runs, R resamples.

Images are drawn, not questions. A resample gives every image a weight, and the weighted sums give
the headline number of both sides, composites included: what is resampled is what is published.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import Statistic
from llm2clip_plugin.bootstrap import (
    BLOCK,
    cluster_codes,
    cluster_sums,
    expansion,
    percentile_interval,
    resample,
    t_cdf,
    t_quantile,
)

MOST_CLUSTERS = 20_000  # resampled; the error of a standard error from that many is half a percent


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
    Questions that count in no run are left out, so that their images are not drawn."""
    counted_N = counted([*base, *new])
    code_N, count = cluster_codes(list(compress(clusters, counted_N)))
    stratum_C = np.zeros(count, dtype=int)
    if base[0].strata is not None:
        stratum_C[code_N] = base[0].strata[counted_N]
    base_MCK = np.stack([cluster_sums(run.sums[counted_N], code_N, count) for run in base])
    new_MCK = np.stack([cluster_sums(run.sums[counted_N], code_N, count) for run in new])
    return Paired(base_MCK, new_MCK, base[0], stratum_C)


def counted(runs: list[Statistic]) -> np.ndarray:
    """(N,) booleans: the questions that count in at least one run."""
    counted_MN = [
        np.ones(len(run.sums), bool) if run.counted is None else run.counted for run in runs
    ]
    return np.any(counted_MN, axis=0)


def resampled_runs(
    paired: Paired, resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(M, R) values of every run of base and of new, all on the same resampled images."""
    value = paired.statistic.value
    base_blocks = []
    new_blocks = []
    for weight_RC in resample(paired.strata, resamples, rng):
        base_blocks.append(np.stack([value(weight_RC @ run_CK) for run_CK in paired.base]))
        new_blocks.append(np.stack([value(weight_RC @ run_CK) for run_CK in paired.new]))
    return np.concatenate(base_blocks, axis=1), np.concatenate(new_blocks, axis=1)


def in_blocks(paired: Paired, most: int, rng: np.random.Generator) -> Paired:
    """The same sums over about ``most`` blocks of images, drawn at random within strata: a mean
    over many images varies as one over many blocks of them, and resampling costs time in proportion
    to what is drawn."""
    if paired.clusters <= most:
        return paired
    block_C = np.empty(paired.clusters, dtype=int)
    start = 0
    for stratum in np.unique(paired.strata):
        (members,) = np.nonzero(paired.strata == stratum)
        blocks = max(1, round(most * len(members) / paired.clusters))
        block_C[rng.permutation(members)] = start + np.arange(len(members)) * blocks // len(members)
        start += blocks
    strata = np.empty(start, dtype=int)
    strata[block_C] = paired.strata
    base = np.stack([cluster_sums(run_CK, block_C, start) for run_CK in paired.base])
    new = np.stack([cluster_sums(run_CK, block_C, start) for run_CK in paired.new])
    return Paired(base, new, paired.statistic, strata)


def permutation_p(
    paired: Paired, observed: float, resamples: int, rng: np.random.Generator
) -> float:
    """Two-sided p: how often the difference is as large when base and new are swapped at random,
    image by image."""
    base_CK = paired.base[0]
    new_CK = paired.new[0]
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


def compare(
    paired: Paired, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Estimate, interval and p-value of new minus base.

    One run per side: the interval is ``percentile_interval`` of the resampled differences, p is
    from a permutation over images. Several runs: the variance between runs is added to that over
    images which all runs share, and interval and p are Student's with Welch and Satterthwaite's
    degrees of freedom.
    """
    rng = np.random.default_rng(seed)
    paired = in_blocks(paired, MOST_CLUSTERS, rng)
    value = paired.statistic.value
    base_M = np.array([float(value(run_CK.sum(axis=0))) for run_CK in paired.base])
    new_M = np.array([float(value(run_CK.sum(axis=0))) for run_CK in paired.new])
    values = [base_M, new_M]
    base = float(base_M.mean())
    new = float(new_M.mean())
    base_MR, new_MR = resampled_runs(paired, resamples, rng)
    difference_R = new_MR.mean(axis=0) - base_MR.mean(axis=0)
    freedom = max(1, paired.clusters - len(np.unique(paired.strata)))
    wider = expansion(paired.clusters, freedom)
    error = wider * float(np.std(difference_R))
    spreads = [float(np.std(side, ddof=1)) if len(side) > 1 else 0.0 for side in values]
    if max(map(len, values)) == 1:
        low, high = percentile_interval(difference_R, paired.clusters, freedom, level)
        p = permutation_p(paired, new - base, resamples, rng)
        test = "permutation over images"
    else:
        slips = [wider**2 * slips_of(side_MR) for side_MR in (base_MR, new_MR)]
        error, freedom = _add_runs(error, freedom, values, slips)
        reach = t_quantile(0.5 + level / 2, freedom) * error
        low = new - base - reach
        high = new - base + reach
        p = float(new == base)
        test = "t over images and runs"
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
        detectable=(t_quantile(0.5 + level / 2, freedom) + t_quantile(0.8, freedom)) * error,
        spread_base=spreads[0],
        spread_new=spreads[1],
    )


def slips_of(values_MR: np.ndarray) -> float:
    """The variance over images of one run that other runs of the side don't share: what it gets
    wrong by chance. One run has the variance s + i over images, the mean of M runs s + i / M; this
    is i, 0 where one run can't tell."""
    runs = len(values_MR)
    if runs == 1:
        return 0.0
    more = float(np.var(values_MR, axis=1).mean() - np.var(values_MR.mean(axis=0)))
    return max(0.0, more) * runs / (runs - 1)


def _add_runs(
    error: float, freedom: int, values: Sequence[np.ndarray], slips: Sequence[float]
) -> tuple[float, int]:
    """Standard error and degrees of freedom with the variance between runs; a single run gets the
    other side's. Runs differ by their slips, too, which the variance over images has already, so
    they leave that."""
    # which side's runs tell the variance of each
    with_runs = [side for side in (0, 1) if len(values[side]) > 1]
    sources = [side if side in with_runs else with_runs[0] for side in (0, 1)]
    over_images = error**2 - sum(
        slips[source] / len(side) for source, side in zip(sources, values, strict=True)
    )
    parts = [(max(0.0, over_images), freedom)]
    for source, side in zip(sources, values, strict=True):
        between_runs = float(np.var(values[source], ddof=1))
        parts.append((between_runs / len(side), max(1, len(side) - 1)))
    return combine(parts)


def combine(parts: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Standard error and Satterthwaite's degrees of freedom of a sum of variances, each with its
    own."""
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / degrees for variance, degrees in parts)
    return math.sqrt(total), max(1, int(total**2 / below)) if below else parts[0][1]


def holm(values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = np.argsort(values, kind="stable")
    tests_left = len(values) - np.arange(len(values))
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, tests_left * np.sort(values)))
    return adjusted.tolist()
