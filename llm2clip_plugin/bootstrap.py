"""Bootstrap over clusters: the interval of ``llm2clip evaluate``.

Several captions of one image, or several questions about it, are right or wrong together; drawing
them one by one makes the interval too narrow. So clusters are drawn with replacement, and a
statistic is a function of the sums over the drawn items (a ratio: clusters may differ in size).

Shapes: N items, C clusters, K sums, R resamples.

Sources: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 3.8 and 5.3;
the percentiles are those of Hesterberg (2015), The American Statistician 69, "expanded percentile".
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np

BLOCK = 1 << 22  # weights made at once: 32 MiB
NORMAL = NormalDist()
# of the quadrature of Student's density; the error is below 1e-12 for whole degrees of freedom
T_NODES = 100


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float
    high: float
    clusters: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``values``; ``clusters`` names each value's cluster (None: every
    value is its own).

    Raises ValueError for no values, or another number of ``clusters``. With one cluster low and
    high are NaN.
    """
    value_N = np.asarray(values, dtype=np.float64)
    if value_N.ndim != 1 or not len(value_N):
        raise ValueError(
            f"a bootstrap needs a list of values, got shape {value_N.shape}"
        )
    if clusters is not None and len(clusters) != len(value_N):
        raise ValueError(f"{len(clusters)} clusters for {len(value_N)} values")
    if clusters is None:
        code_N = np.arange(len(value_N))
        count = len(value_N)
    else:
        code_N, count = cluster_codes(clusters)
    value_and_one_N2 = np.stack([value_N, np.ones(len(value_N))], axis=1)
    sums_C2 = cluster_sums(value_and_one_N2, code_N, count)
    mean = float(value_N.mean())
    if count < 2:
        return Interval(
            mean=mean, low=math.nan, high=math.nan, clusters=count, level=level
        )
    one_stratum_C = np.zeros(count, dtype=int)
    weights = resample(one_stratum_C, resamples, np.random.default_rng(seed))
    totals = [weight_RC @ sums_C2 for weight_RC in weights]
    draw_R = np.concatenate([total_R2[:, 0] / total_R2[:, 1] for total_R2 in totals])
    low, high = percentile_interval(draw_R, count, count - 1, level)
    return Interval(mean=mean, low=low, high=high, clusters=count, level=level)


def interval_of_hits(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """As ``bootstrap_mean``, of fractions from 0 to 1. Where all are 0 or all are 1, no resample
    differs, and the other end is the exact one of so many clusters (Clopper and Pearson 1934,
    Biometrika 26): 0 of 14 is at most 23 %."""
    interval = bootstrap_mean(values, clusters)
    if interval.clusters < 2:
        return interval
    farthest = 1 - ((1 - interval.level) / 2) ** (1 / interval.clusters)
    if interval.mean == 0:
        return replace(interval, high=farthest)
    if interval.mean == 1:
        return replace(interval, low=1 - farthest)
    return interval


def cluster_codes(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """(N,) cluster numbers and how many there are; numbered by name, so that the items' order does
    not matter."""
    names = sorted(set(clusters), key=str)
    code_of = {name: code for code, name in enumerate(names)}
    return np.array([code_of[name] for name in clusters], dtype=np.int64), len(names)


def cluster_sums(sums_NK: np.ndarray, code_N: np.ndarray, count: int) -> np.ndarray:
    """(C, K) sums over the items of each cluster."""
    total_CK = np.zeros((count, sums_NK.shape[1]))
    np.add.at(total_CK, code_N, sums_NK)
    return total_CK


def resample(
    stratum_C: np.ndarray, resamples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Blocks (r, C) of weights: how often each cluster is drawn; clusters are drawn within their
    stratum."""
    members = [np.flatnonzero(stratum_C == stratum) for stratum in np.unique(stratum_C)]
    done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, BLOCK // len(stratum_C)))
        weight_RC = np.zeros((rows, len(stratum_C)))
        for member in members:
            drawn = rng.integers(0, len(member), size=(rows, len(member)))
            drawn += np.arange(rows)[:, None] * len(member)
            counts = np.bincount(drawn.ravel(), minlength=rows * len(member))
            weight_RC[:, member] = counts.reshape(rows, -1)
        yield weight_RC
        done += rows


def percentile_interval(
    draw_R: np.ndarray, clusters: int, freedom: int, level: float
) -> tuple[float, float]:
    """Interval of resampled values: their percentiles, at levels that make up for few clusters.

    Percentiles alone are too narrow by sqrt((n - 1) / n) and by the normal quantile in place of
    Student's; the expanded level has both. ``freedom``: clusters less strata.
    """
    quantile = t_quantile(0.5 + level / 2, freedom)
    tail = NORMAL.cdf(-expansion(clusters, freedom) * quantile)
    low, high = np.quantile(draw_R, [tail, 1 - tail])
    return float(low), float(high)


def expansion(clusters: int, freedom: int) -> float:
    """sqrt(n / (n - strata)): what the standard deviation of resampled values lacks; 1 for a single
    cluster."""
    return math.sqrt(clusters / freedom) if clusters > 1 else 1.0


# Student's t with f degrees of freedom. SciPy has it, but would be half of the base install. With t
# = sqrt(f) tan(a) the density over the angle a is proportional to cos(a) ** (f - 1): smooth, and on
# a bounded interval.


@lru_cache(maxsize=4096)
def t_quantile(level: float, freedom: float) -> float:
    """Student's quantile; the normal one above 2000 degrees of freedom."""
    if freedom > 2000:
        return NORMAL.inv_cdf(level)
    low = -math.pi / 2
    high = math.pi / 2
    for _ in range(60):  # bisection down to the last bit
        middle = (low + high) / 2
        if probability_below(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def t_cdf(value: float, freedom: float) -> float:
    """Student's distribution function; ``freedom`` is at least 1."""
    return probability_below(math.atan(value / math.sqrt(freedom)), freedom)


def probability_below(angle: float, freedom: float) -> float:
    """The probability that a t-distributed value is below ``sqrt(freedom) * tan(angle)``."""
    # cos(a) ** (f - 1) < exp(-(f - 1) a^2 / 2), which is 1e-20 where (f - 1) a^2 = 92
    reach = min(abs(angle), math.sqrt(92 / max(freedom - 1, 1)))
    nodes_N, weights_N = quadrature()
    heights_N = np.cos(reach * nodes_N) ** (freedom - 1)
    area = reach * float(weights_N @ heights_N)
    log_ratio = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    whole = math.sqrt(math.pi) * math.exp(log_ratio)
    return 0.5 + math.copysign(area / whole, angle)


@lru_cache(maxsize=1)
def quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre on [0, 1]."""
    nodes_N, weights_N = np.polynomial.legendre.leggauss(T_NODES)
    return (nodes_N + 1) / 2, weights_N / 2
