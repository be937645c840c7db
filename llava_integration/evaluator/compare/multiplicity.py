"""Several comparisons at a time: p-values and intervals that hold for all of them together."""

from collections.abc import Collection, Sequence
from string import ascii_lowercase

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


def letters(
    names: Sequence[str], told_apart: Collection[tuple[str, str]]
) -> dict[str, str]:
    """A compact letter display: two names share a letter if and only if they are not told apart.
    The first name, the best, has an a. Insert and absorb (Piepho 2004)."""
    groups = [set(names)]
    for pair in told_apart:
        split: list[set[str]] = []
        for group in groups:
            if group.issuperset(pair):
                split += [group - {member} for member in pair]
            else:
                split.append(group)
        groups = without_subsets(split)
    position = {name: number for number, name in enumerate(names)}
    groups.sort(key=lambda group: sorted(position[name] for name in group))
    labels: dict[str, str] = {name: "" for name in names}
    for number, group in enumerate(groups):
        for name in group:
            labels[name] += letter(number)
    return labels


def without_subsets(groups: Sequence[set[str]]) -> list[set[str]]:
    """The groups, without those that are part of another, or equal to an earlier one."""
    largest: list[set[str]] = []
    for group in sorted(groups, key=len, reverse=True):
        if not any(group <= other for other in largest):
            largest.append(group)
    return largest


def letter(number: int) -> str:
    """a to z, then (27), (28) and so on."""
    if number < len(ascii_lowercase):
        return ascii_lowercase[number]
    return f"({number + 1})"
