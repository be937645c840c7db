"""Intervals for means over items that come in clusters: the percentile bootstrap over clusters.

Several captions of one image, or several drawings of one family, are right or wrong together; drawing them one by
one would make the interval too narrow. So whole clusters are drawn with replacement, and the mean is over the items
drawn (a ratio: clusters may differ in size). For the difference of two towers on the same items, pass the
differences item by item.

Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 3.8 and 5.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS_AT_ONCE = 1 << 22  # cluster draws held at once


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
    """Interval of the mean of ``values``; ``clusters`` names each value's cluster (each its own without it).

    Raises ValueError for no values, or other than one cluster a value. With one cluster the interval is not
    known: low and high are NaN.
    """
    value = np.asarray(values, dtype=np.float64)
    if value.ndim != 1 or not len(value):
        raise ValueError(f"a bootstrap needs a list of values, got shape {value.shape}")
    if clusters is None:
        total, size = value, np.ones(len(value))
    else:
        if len(clusters) != len(value):
            raise ValueError(f"{len(clusters)} clusters for {len(value)} values")
        names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        place = np.fromiter((names[name] for name in clusters), dtype=np.int64, count=len(value))
        total, size = np.bincount(place, weights=value), np.bincount(place).astype(np.float64)
    mean = float(value.mean())
    if len(total) < 2:
        return Interval(mean=mean, low=float("nan"), high=float("nan"), clusters=len(total), level=level)
    means = _resampled_means(total, size, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=mean, low=float(low), high=float(high), clusters=len(total), level=level)


def _resampled_means(total: np.ndarray, size: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples,) means over clusters drawn with replacement; ``total``, ``size``: one entry a cluster."""
    clusters, means = len(total), np.empty(resamples)
    rows = max(1, DRAWS_AT_ONCE // clusters)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, clusters, size=(min(rows, resamples - start), clusters))
        means[start : start + len(drawn)] = total[drawn].sum(1) / size[drawn].sum(1)
    return means
