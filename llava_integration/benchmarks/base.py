"""What scoring passes around (questions, items, options) and the arithmetic that the benchmarks share.

A question is one line of a benchmark's annotations; an item is what a score file says about one question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_integration.benchmarks.answers import Answer

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark, from its annotation files."""

    id: int | str  # the item's id in the score file, typed as in the annotations
    text: str  # without the suffix that LLaVA appends
    cluster: str  # its image: questions about one image are resampled together
    truth: Any  # label, letter, or list of human answers
    image: str = ""  # path below one of the benchmark's image folders
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose about scoring."""

    allow: float = 0.10  # largest fraction of missing, duplicate, unreadable or unknown answers; below one chunk of 8
    reviews: Path | None = None  # the judge's file, for benchmarks that need one


@dataclass(kw_only=True)
class Scored:
    """A benchmark's result for one answers file."""

    metrics: dict[str, float]
    items: list[Item]  # id, score, cluster, answer, truth, question, category, image ...
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statistic:
    """A headline number as a function of sums over questions. Shapes: N questions, K sums.

    A resample is a weight for each question, its totals are ``weight_N @ sums_NK``, and ``value`` maps totals (..., K)
    to numbers (...) in the published unit.
    """

    sums: np.ndarray  # (N, K)
    value: Callable[[np.ndarray], np.ndarray]
    strata: np.ndarray | None = None  # (N,) integers: images are drawn within their part, whose size is fixed
    counted: np.ndarray | None = None  # (N,) booleans: the questions that the number is about; None: all

    def full(self) -> float:
        """The number on all questions, each once."""
        return float(self.value(self.sums.sum(axis=0)))


def text_of(answer: Answer | None) -> str:
    """The answer's text; "" for a missing answer."""
    return answer.text or "" if answer else ""


def item_of(question: Question, answer: Answer | None, /, **fields: Any) -> Item:
    """An item: what every benchmark records about a question, and ``fields`` (``score`` at least)."""
    return {
        "id": question.id,
        "cluster": question.cluster,
        "answer": text_of(answer),
        "missing": answer is None,
        "truth": question.truth,
        "question": question.text,
        "category": question.category,
        "image": question.image,
        **fields,
    }


def mean(values: Sequence[float]) -> float:
    """Plain mean, added in the order given as the official scripts do; 0.0 for no values."""
    return float(sum(values)) / len(values) if values else 0.0


def mean_of(items: Sequence[Item], field: str = "score") -> float:
    """Mean of a field over items."""
    return mean([item[field] for item in items])


def by_group(items: Sequence[Item], group: str, field: str = "score") -> dict[str, list[float]]:
    """Values of a field, listed by another field, groups in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(str(item[group]), []).append(float(item[field]))
    return groups


def percents(items: Sequence[Item], group: str, field: str = "score") -> dict[str, float]:
    """Mean of a field in each group, percent, rounded to 2 places as the official scripts print it."""
    return {key: round(100 * mean(values), 2) for key, values in by_group(items, group, field).items()}


def precision_recall_f1(true_yes: int, false_yes: int, false_no: int) -> tuple[float, float, float]:
    """Precision, recall and F1 of "yes"; 0 where the divisor is 0."""
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested dictionaries under dotted names: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1.0}``."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = float(value)
    return flat


def mean_statistic(values: Sequence[float], counted: Sequence[bool] | None = None, scale: float = 100.0) -> Statistic:
    """The statistic ``scale x mean`` over the questions that count."""
    weight = np.ones(len(values)) if counted is None else np.asarray(counted, dtype=float)
    sums = np.stack([np.asarray(values, dtype=float) * weight, weight], axis=1)
    return Statistic(sums, lambda totals: scale * ratio(totals[..., 0], totals[..., 1]), counted=weight > 0)


def answered_statistic(items: Sequence[Item]) -> Statistic:
    """Mean score of the answered questions, percent."""
    return mean_statistic([item["score"] for item in items], [not item.get("missing") for item in items])


def mean_of_parts(parts: Sequence[str], scores: Sequence[float], scale: float) -> Statistic:
    """The statistic ``scale x mean over parts of the part's mean score``."""
    names = sorted(set(parts))
    sums = np.zeros((len(scores), 2 * len(names)))
    for row, (part, score) in enumerate(zip(parts, scores, strict=True)):
        column = 2 * names.index(part)
        sums[row, column : column + 2] = score, 1
    return Statistic(sums, lambda totals: scale * ratio(totals[..., 0::2], totals[..., 1::2]).mean(axis=-1))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Elementwise quotient, 0 where the divisor is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
