"""Several comparisons at a time: p-values and intervals that hold for all of them together."""

from collections.abc import Sequence

import numpy as np


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    order = np.argsort(values, kind="stable")
    tests_left = len(values) - np.arange(len(values))
    in_order = np.minimum(1, tests_left * np.sort(values))
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(in_order)
    return adjusted.tolist()


def holm_factors(values: Sequence[float]) -> list[float]:
    """How many times stricter than one test Holm's is for each: an interval at 1 - alpha / factor
    excludes 0 if and only if the adjusted p is below alpha."""
    order = np.argsort(values, kind="stable")
    sorted_values = np.sort(values)
    tests_left = (len(values) - np.arange(len(values))).astype(float)
    adjusted = np.maximum.accumulate(tests_left * sorted_values)
    factors = tests_left.copy()
    # a p-value of 0 is below alpha with any factor
    positive = sorted_values > 0
    ratios = adjusted[positive] / sorted_values[positive]
    factors[positive] = np.maximum(tests_left[positive], ratios)
    in_given_order = np.empty(len(values))
    in_given_order[order] = factors
    return in_given_order.tolist()
