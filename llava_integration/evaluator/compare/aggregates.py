"""Numbers that evaluators compute from many documents and that no benchmark of ours has:
perplexity, and F1 and Matthews' correlation of pairs of labels."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import Item, Statistic, ratio
from llava_integration.evaluator.compare.readers import (
    BITS,
    LABELS_F1,
    LABELS_MCC,
    PERPLEXITY,
)


def perplexity(items: Sequence[Item]) -> Statistic:
    """The negative of the perplexity over all texts."""
    return Statistic(likelihoods(items), lambda totals: -np.exp(-mean_of(totals)))


def bits_per_byte(items: Sequence[Item]) -> Statistic:
    """The negative of the bits per byte over all texts."""
    return Statistic(likelihoods(items), lambda totals: mean_of(totals) / math.log(2))


def likelihoods(items: Sequence[Item]) -> np.ndarray:
    """(N, 2) log-likelihood and length of each text."""
    return np.array([(item["loglikelihood"], item["length"]) for item in items])


def mean_of(totals: np.ndarray) -> np.ndarray:
    """Log-likelihood per unit of length."""
    return ratio(totals[..., 0], totals[..., 1])


def f1_of_labels(items: Sequence[Item]) -> Statistic:
    """The F1 of label 1, in percent; ``label`` is the truth, ``parsed`` what was predicted."""
    counts = []
    for item in items:
        is_true = str(item["label"]) == "1"
        is_said = str(item["parsed"]) == "1"
        counts.append((is_true and is_said, int(is_true) + int(is_said)))
    sums = np.array(counts, dtype=float)
    return Statistic(sums, lambda totals: 200 * ratio(totals[..., 0], totals[..., 1]))


def mcc_of_labels(items: Sequence[Item]) -> Statistic:
    """Matthews' correlation coefficient of K labels, times 100."""
    pairs = [(str(item["label"]), str(item["parsed"])) for item in items]
    labels = sorted({label for pair in pairs for label in pair})
    size = len(labels)
    sums = np.zeros((len(pairs), size * size))
    for number, (truth, answer) in enumerate(pairs):
        sums[number, labels.index(truth) * size + labels.index(answer)] = 1

    def value(totals: np.ndarray) -> np.ndarray:
        confusion = totals.reshape(*totals.shape[:-1], size, size)
        count = confusion.sum(axis=(-2, -1))
        right = np.trace(confusion, axis1=-2, axis2=-1)
        true = confusion.sum(axis=-1)
        said = confusion.sum(axis=-2)
        covariance = right * count - (true * said).sum(axis=-1)
        true_variance = count**2 - (true**2).sum(axis=-1)
        said_variance = count**2 - (said**2).sum(axis=-1)
        return 100 * ratio(covariance, np.sqrt(true_variance * said_variance))

    return Statistic(sums, value)


AGGREGATES: dict[str, Callable[[Sequence[Item]], Statistic]] = {
    PERPLEXITY: perplexity,
    BITS: bits_per_byte,
    LABELS_F1: f1_of_labels,
    LABELS_MCC: mcc_of_labels,
}
