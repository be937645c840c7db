"""Paired statistics of two models on the same questions: several questions per image, one or
several runs per side.

Shapes: N questions, C clusters (images), S strata, K sums of a statistic, M runs.

The unit is the cluster. A cluster's influence is its share in the headline number's difference, by
the number's gradient, so that composites are compared as composites. The test is Student's t of the
sum of influences, with what makes it keep its promise where questions are few:

- CR2, and Satterthwaite's degrees of freedom for clusters of unequal size, whose questions go
  together (Bell and McCaffrey 2002; Pustejovsky and Tipton 2018);
- two more clusters, one for each side, as far as the differences are all alike: without a
  disagreement the variance would be 0 (Bonett and Price 2012, where they are won, lost or tied);
- Hall's transformation for skewed differences (Hall 1992), less of it where few clusters count;
- the variance between runs, which is at least that of the runs' slips.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import Statistic
from llava_integration.evaluator.compare.estimate import Estimate, combine
from llm2clip_plugin.bootstrap import (
    NORMAL,
    cluster_codes,
    cluster_sums,
    t_quantile,
)

STEP = 1e-4  # of the numeric gradient, relative to a sum
ROUNDING = 1e-12  # of sums of equal scores, relative
ALIKE = 9  # decimal places to which differences are equal
# two runs that are near each other by chance would be weighed as if they never varied: 6 % of false
# verdicts with 2 against 8 runs
LEAST_OF_POOLED = 0.5
# degrees of freedom per cluster of a category whose few clusters agree: their mean is far from
# normal, and with 2 of 502 items in a category 10 % of verdicts would be wrong
FREEDOM_OF_ALIKE = 2
REACH = 0.975  # quantile by which the intervals of two variances are compared
POWER = 0.8  # with which a detectable difference is detected


@dataclass(frozen=True)
class Paired:
    """Sums by cluster of every run of both sides, on the same questions."""

    base: np.ndarray  # (M_base, C, K)
    new: np.ndarray  # (M_new, C, K)
    statistic: Statistic  # for its value function
    strata: np.ndarray  # (C,) integers; the number of clusters of a stratum is given
    sizes: np.ndarray  # (C,) questions

    @property
    def clusters(self) -> int:
        """C, the number of images."""
        return self.base.shape[1]

    @property
    def share_of_stratum(self) -> np.ndarray:
        """(C,) each cluster's share of its stratum's questions."""
        questions_S = np.bincount(self.strata, self.sizes)
        return self.sizes / questions_S[self.strata]

    @property
    def weights(self) -> np.ndarray:
        """(C,) each cluster's share in the number: strata weigh the same, as do the questions of
        one."""
        return self.share_of_stratum / len(np.unique(self.strata))

    @property
    def freedom(self) -> int:
        """Degrees of freedom of equal clusters: C less the strata."""
        return self.clusters - len(np.unique(self.strata))


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
    test: str  # the test that p and the interval come from
    detectable: float  # the true difference that is detected with 80 % power
    # no difference is, below the largest that there can be, which ``detectable`` then is
    detects_nothing: bool
    spread_base: float  # standard deviation over runs; 0 with one run
    spread_new: float
    estimate: Estimate

    def interval(self, level: float) -> tuple[float, float]:
        """The interval of another level; it always has the estimate."""
        low, high = self.estimate.interval(level)
        return min(low, self.difference), max(high, self.difference)


def pair(base: list[Statistic], new: list[Statistic], clusters: list[str]) -> Paired:
    """Sums by cluster of both sides' runs, which have the same questions in the same order.
    Questions that count in no run are left out."""
    counted_N = counted([*base, *new])
    code_N, count = cluster_codes(list(compress(clusters, counted_N)))
    stratum_C = np.zeros(count, dtype=int)
    if base[0].strata is not None:
        stratum_C = strata_of(code_N, base[0].strata[counted_N], count)

    def sums_of(runs: list[Statistic]) -> np.ndarray:
        """(M, C, K)"""
        sums = [cluster_sums(run.sums[counted_N], code_N, count) for run in runs]
        return np.stack(sums)

    size_C = np.bincount(code_N, minlength=count).astype(float)
    return Paired(sums_of(base), sums_of(new), base[0], stratum_C, size_C)


def strata_of(code_N: np.ndarray, stratum_N: np.ndarray, clusters: int) -> np.ndarray:
    """(C,) each cluster's stratum, from 0; all the same if clusters have questions of several."""
    stratum_C = np.zeros(clusters, dtype=int)
    stratum_C[code_N] = stratum_N
    if np.any(stratum_C[code_N] != stratum_N):
        return np.zeros(clusters, dtype=int)
    _, number_C = np.unique(stratum_C, return_inverse=True)
    return number_C


def counted(runs: list[Statistic]) -> np.ndarray:
    """(N,) booleans: the questions that count in at least one run."""
    counted_MN = []
    for run in runs:
        if run.counted is None:
            counted_MN.append(np.ones(len(run.sums), bool))
        else:
            counted_MN.append(run.counted)
    return np.any(counted_MN, axis=0)


def compare(
    paired: Paired,
    *,
    level: float = 0.95,
    span: float = 100.0,
    pair_runs: bool = False,
) -> Difference:
    """Estimate, interval and p-value of new minus base. ``span``: the largest difference there can
    be, in the statistic's unit.

    With several runs a side the variance between them is added to that over images, which all runs
    share, with Welch's and Satterthwaite's degrees of freedom. With ``pair_runs`` the first run of
    base goes with the first of new, and so on: what varies is their difference.
    """
    base_M = values_of(paired, paired.base)
    new_M = values_of(paired, paired.new)
    base = float(base_M.mean())
    new = float(new_M.mean())
    base_MC, new_MC = influences(paired)
    estimate = over_clusters(paired, new - base, base_MC, new_MC, span)
    test = "t over images"
    if pair_runs and len(base_M) > 1:
        test = "t over images and paired runs"
        slips = [slips_of(new_MC - base_MC)]
        estimate = with_runs(estimate, [new_M - base_M], slips)
    elif max(len(base_M), len(new_M)) > 1:
        test = "t over images and runs"
        slips = [slips_of(base_MC), slips_of(new_MC)]
        estimate = with_runs(estimate, [base_M, new_M], slips)
    low, high = estimate.interval(level)
    detectable = detectable_difference(estimate, level)
    return Difference(
        base=base,
        new=new,
        difference=new - base,
        low=min(low, new - base),
        high=max(high, new - base),
        standard_error=estimate.error,
        p=estimate.p(),
        test=test,
        detectable=min(span, detectable),
        detects_nothing=detectable >= span,
        spread_base=deviation(base_M),
        spread_new=deviation(new_M),
        estimate=estimate,
    )


def values_of(paired: Paired, runs_MCK: np.ndarray) -> np.ndarray:
    """(M,) the headline number of each run."""
    value = paired.statistic.value
    return np.array([float(value(run_CK.sum(axis=0))) for run_CK in runs_MCK])


def detectable_difference(estimate: Estimate, level: float) -> float:
    """The true difference that is detected with this power."""
    if estimate.freedom == 0:
        return math.inf
    reach = t_quantile(0.5 + level / 2, estimate.freedom)
    reach += t_quantile(POWER, estimate.freedom)
    return reach * estimate.error


def deviation(values_M: np.ndarray) -> float:
    """Standard deviation over runs; 0 with one run."""
    return float(np.std(values_M, ddof=1)) if len(values_M) > 1 else 0.0


# Influences: what each cluster adds to the headline number


def influences(paired: Paired) -> tuple[np.ndarray, np.ndarray]:
    """(M, C) what each cluster adds to the headline number of every run of base and of new, apart
    from the mean of its stratum."""
    base_MC = centered_influences(paired, paired.base)
    new_MC = centered_influences(paired, paired.new)
    return base_MC, new_MC


def centered_influences(paired: Paired, runs_MCK: np.ndarray) -> np.ndarray:
    """(M, C) the influences of one side."""
    value = paired.statistic.value
    influence_MC = np.stack([run_CK @ gradient(value, run_CK) for run_CK in runs_MCK])
    for stratum in np.unique(paired.strata):
        members = paired.strata == stratum
        mean_M1 = influence_MC[:, members].mean(axis=1, keepdims=True)
        influence_MC[:, members] -= mean_M1
    return influence_MC


def gradient(
    value: Callable[[np.ndarray], np.ndarray], run_CK: np.ndarray
) -> np.ndarray:
    """(K,) the derivative of the headline number by each of its sums."""
    total_K = run_CK.sum(axis=0)
    step_K = STEP * np.maximum(np.abs(total_K), 1)
    moved_KK = np.diag(step_K)
    return (value(total_K + moved_KK) - value(total_K - moved_KK)) / (2 * step_K)


# The test over clusters, of which all runs have the same


def over_clusters(
    paired: Paired,
    difference: float,
    base_MC: np.ndarray,
    new_MC: np.ndarray,
    span: float,
) -> Estimate:
    """The test over clusters, of the mean over runs."""
    clusters = paired.clusters
    if paired.freedom < 1:
        return Estimate(
            center=difference,
            error=0.0,
            freedom=0.0,
            skew=0.0,
            count=clusters,
            span=span,
        )
    influence_C = new_MC.mean(axis=0) - base_MC.mean(axis=0)
    weight_C = paired.weights
    added, size = added_clusters(paired, influence_C + difference * weight_C, span)
    count = clusters + added
    # the mean of the added clusters is 0: half of them win ``size``, half lose it
    shrunk = clusters / count
    center = difference * shrunk
    residual_C = shrunk * (influence_C + (difference - center) * weight_C)
    won = shrunk * (size - center / clusters)
    lost = shrunk * (size + center / clusters)
    variance, freedom = over_strata(paired, influence_C, residual_C, span)
    correction = 1 / (1 - 1 / count)  # CR2's for a cluster of mean size
    variance += added / 2 * (won**2 + lost**2) * correction
    skew = 0.0
    if variance > 0:
        third_moment = float(np.sum(residual_C**3))
        skew = third_moment * math.sqrt(count) / variance**1.5
    # a skewness of few clusters is noise
    trust = min(1.0, freedom / paired.freedom) ** 2
    return Estimate(
        center=center,
        error=math.sqrt(variance),
        freedom=freedom,
        skew=skew * trust,
        count=count,
        span=span,
    )


def added_clusters(
    paired: Paired, contribution_C: np.ndarray, span: float
) -> tuple[float, float]:
    """How many clusters to add, half of them won and half lost, and how large they are: two, times
    the share of clusters whose difference is the same. They are as large as the others that are no
    ties.

    ``contribution_C``: what each cluster adds to the difference."""
    base_CK = paired.base.mean(axis=0)
    new_CK = paired.new.mean(axis=0)
    equal_CK = np.isclose(base_CK, new_CK, rtol=ROUNDING, atol=ROUNDING)
    tied_C = np.all(equal_CK, axis=1)
    untied_C = ~tied_C
    by_question_C = contribution_C[untied_C] / paired.weights[untied_C]
    rounded_C = np.round(by_question_C / span, ALIKE)
    _, count = np.unique(rounded_C, return_counts=True)
    most_common = max(int(tied_C.sum()), int(count.max(initial=0)))
    if tied_C.all():
        size = span / paired.clusters
    else:
        size = math.sqrt(np.mean(contribution_C[untied_C] ** 2))
    if most_common == 1:
        return 0.0, size
    return 2 * most_common / paired.clusters, size


def over_strata(
    paired: Paired, influence_C: np.ndarray, residual_C: np.ndarray, span: float
) -> tuple[float, float]:
    """The variance over clusters, and Satterthwaite's degrees of freedom: a small category that
    weighs as much as a large one has most of the variance and little freedom. A stratum that shows
    no variance, such as one of a single cluster, is taken to vary as the clusters of all do."""
    share_C = paired.share_of_stratum
    # a cluster that is its stratum has no variance to correct
    leverage_C = np.where(share_C < 1, share_C, 0.0)
    square_C = residual_C**2 / (1 - leverage_C)
    count_S = np.bincount(paired.strata)
    if len(count_S) == 1:
        return float(np.sum(square_C)), effective_freedom(paired.sizes)
    weight_C = paired.weights
    several_C = count_S[paired.strata] > 1
    by_question = float(np.mean(square_C[several_C] / weight_C[several_C] ** 2))
    alike_C = np.isclose(influence_C, 0, atol=10**-ALIKE * span / paired.clusters)
    parts = []
    for stratum in range(len(count_S)):
        members = paired.strata == stratum
        variance = float(np.sum(square_C[members]))
        if alike_C[members].all():
            as_all = by_question * float(np.sum(weight_C[members] ** 2))
            freedom = paired.freedom
            if count_S[stratum] > 1:
                freedom = min(FREEDOM_OF_ALIKE * int(count_S[stratum]), freedom)
            parts.append((max(variance, as_all), float(freedom)))
        else:
            parts.append((variance, effective_freedom(paired.sizes[members])))
    if sum(variance for variance, _ in parts) == 0:
        return 0.0, float(paired.freedom)
    return nearer(paired, parts, span)


def nearer(
    paired: Paired, parts: Sequence[tuple[float, float]], span: float
) -> tuple[float, float]:
    """The sum of the strata's variances, and its degrees of freedom. Two items tell so little of
    their variance that its interval can be wider than that of the largest variance that scores can
    have, which needs no estimate: where this makes the interval narrower, it takes the place of
    theirs."""
    limited = []
    for stratum, (variance, freedom) in enumerate(parts):
        members = paired.strata == stratum
        largest = float(np.sum((span * paired.weights[members]) ** 2))
        reach = t_quantile(REACH, freedom) / NORMAL.inv_cdf(REACH)
        if reach**2 * variance > largest:
            limited.append((largest, float(paired.freedom)))
        else:
            limited.append((variance, freedom))
    results = [combine(parts), combine(limited)]
    error, freedom = min(results, key=lambda both: both[0] * t_quantile(REACH, both[1]))
    return error**2, freedom


def effective_freedom(size_C: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of the CR2 variance, if the questions of a cluster all go
    together: C - 1 for clusters of one size, fewer for unequal ones."""
    # the covariance of the corrected residuals is A + B: A diagonal, B of rank two
    variance_C = size_C**2
    share_C = np.minimum(size_C / size_C.sum(), 1 - 1e-9)
    corrected_C = 1 / np.sqrt(1 - share_C)
    x_C = corrected_C * variance_C
    y_C = corrected_C * share_C
    total = variance_C.sum()
    diagonal_C = variance_C * corrected_C**2
    on_diagonal_C = total * y_C**2 - 2 * x_C * y_C
    xx = float(x_C @ x_C)
    yy = float(y_C @ y_C)
    xy = float(x_C @ y_C)
    squares = float(diagonal_C @ diagonal_C) + 2 * float(diagonal_C @ on_diagonal_C)
    squares += 2 * xx * yy + 2 * xy**2 + total**2 * yy**2 - 4 * total * yy * xy
    trace = float(np.sum(diagonal_C + on_diagonal_C))
    return max(1.0, float(trace**2 / squares))


# The variance between runs, such as trainings with different seeds


def slips_of(influence_MC: np.ndarray) -> float:
    """The variance over images of one run that other runs of the side don't share: what it gets
    wrong by chance. One run has the variance s + i over images, the mean of M runs s + i / M; this
    is i, 0 where one run can't tell."""
    runs = len(influence_MC)
    if runs == 1:
        return 0.0
    of_one = float(np.sum(influence_MC**2, axis=1).mean())
    of_mean = float(np.sum(influence_MC.mean(axis=0) ** 2))
    return max(0.0, of_one - of_mean) * runs / (runs - 1)


def with_runs(
    estimate: Estimate, values: Sequence[np.ndarray], slips: Sequence[float]
) -> Estimate:
    """The estimate with the variance between runs. Runs differ by their slips, too, which the
    variance over images has already, so they leave that; and what few runs show of their variance
    is at least their slips, and LEAST_OF_POOLED of both sides'. A single run is taken to vary as
    the other side's do; both variances are then one estimate, with its degrees of freedom.

    ``values``: each run's headline number, of each side; ``slips``: of each side. Pairs of runs are
    one side, whose values are differences."""
    if estimate.freedom == 0:
        return estimate
    several = [side for side in range(len(values)) if len(values[side]) > 1]
    squares = 0.0
    freedom_of_runs = 0
    for side in several:
        squares += float(np.var(values[side])) * len(values[side])
        freedom_of_runs += len(values[side]) - 1
    pooled = squares / freedom_of_runs
    over_images = estimate.error**2
    # by the side whose runs tell it: the variance of its own mean, and of a single run
    of_runs = dict.fromkeys(several, 0.0)
    for side, value_M in enumerate(values):
        source = side if side in several else several[0]
        between_runs = max(float(np.var(values[source], ddof=1)), slips[source])
        between_runs = max(between_runs, LEAST_OF_POOLED * pooled)
        over_images -= slips[source] / len(value_M)
        of_runs[source] += between_runs / len(value_M)
    parts = []
    for side, variance in of_runs.items():
        parts.append((variance, len(values[side]) - 1))
    parts.append((max(0.0, over_images), estimate.freedom))
    error, freedom = combine(parts)
    trust = min(1.0, freedom / estimate.freedom) ** 2
    return replace(estimate, error=error, freedom=freedom, skew=estimate.skew * trust)
