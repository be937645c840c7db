"""What every benchmark's file provides, and the arithmetic that they share.

A benchmark is one file with one ``BENCHMARK``: it reads LLaVA's evaluation folder, joins answers to questions,
scores each question, and says how its headline number follows from sums over questions (so that it can be resampled).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_integration.benchmarks.answers import Answer, Answers
from llm2clip_plugin.contracts import sha256_file, sha256_text

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark, as its own annotation files have it."""

    id: int | str  # of the item in the score file, typed as in the benchmark's files
    text: str  # the question itself, without LLaVA's suffix
    cluster: str  # its image: questions of one image are resampled together
    truth: Any  # label, letter, or list of human answers
    image: str = ""  # path below one of the benchmark's image folders
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can decide about scoring."""

    allow: float = 0.10  # largest share of missing, doubled, broken or foreign answers; under one chunk of eight
    corrected: bool = False  # also report the rule without the official script's quirks
    reviews: Path | None = None  # judge's file of benchmarks that need one


@dataclass(kw_only=True)
class Scored:
    """What a benchmark makes of an answers file."""

    metrics: dict[str, float]
    items: list[Item]  # id, score, cluster, answer, truth, question, category, image ...
    counts: dict[str, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statistic:
    """A headline number as a function of sums over questions.

    ``sums`` has one row a question, K columns; a resample is a weight for each row, its totals are ``weights @ sums``,
    and ``value`` maps totals (..., K) to numbers (...) in the published unit. ``strata`` (one integer a question)
    keeps the number of images of each part fixed, for composites whose parts have a fixed size.
    """

    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    strata: np.ndarray | None = None
    counted: np.ndarray | None = None  # (questions,) booleans: which of them the number is about; None: all

    def full(self) -> float:
        """The number on all questions, each once."""
        return float(self.value(self.sums.sum(axis=0)))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: names, where its files are, how it is scored."""

    name: str
    title: str
    headline: str  # key of the headline number in the metrics
    scale: float = 1.0  # published number = metrics[headline] * scale
    unit: str = "%"  # of the published number
    folders: tuple[str, ...]  # names of its folder under LLaVA's playground/data/eval
    questions: tuple[str, ...]  # glob patterns of LLaVA's question file, below the folder
    image_folders: tuple[str, ...] = ("",)  # below the folder, tried in order
    tasks: tuple[str, ...] = ()  # lmms-eval's names of it
    annotations: tuple[str, ...]  # glob patterns of the files that it is scored with
    load: Callable[[Path], list[Question]]  # raises FileNotFoundError where those are not there
    score: Callable[[Path, Answers, Options], Scored]
    statistic: Callable[[Sequence[Item]], Statistic]
    submission: Callable[[Path, Answers, Path], None] | None = None  # writes the file that its server takes
    item_fields: tuple[str, ...] = ()  # what the statistic needs besides score; without it scores are averaged
    image_bytes: Callable[[Path, Item], bytes | None] | None = None  # where images are not files
    needs: str = ""  # "a judge": cannot be scored from the answers alone


def text_of(answer: Answer | None) -> str:
    """What was said; "" where nothing was."""
    return answer.text or "" if answer else ""


def shown(question: Question, answer: Answer | None) -> Item:
    """The part of an item that every benchmark has: which question, its image, what was asked, said and true."""
    return {
        "id": question.id,
        "cluster": question.cluster,
        "answer": text_of(answer),
        "missing": answer is None,
        "truth": question.truth,
        "question": question.text,
        "category": question.category,
        "image": question.image,
    }


MODULES = (
    "vqav2",
    "gqa",
    "vizwiz",
    "scienceqa",
    "textvqa",
    "pope",
    "mme",
    "mmbench",
    "mmbench_cn",
    "seedbench",
    "llava_bench",
    "mmvet",
)


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name; ValueError lists the known ones."""
    if name not in MODULES:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(MODULES)}")
    return importlib.import_module(f"{__package__}.rules.{name}").BENCHMARK


def statistic_of(name: str, items: Sequence[Item]) -> tuple[Statistic, str, str, str]:
    """Statistic, title, unit and a note for a score file's items.

    A benchmark that isn't known, or items without what its composite needs, get the plain mean of their scores.
    """
    chosen = benchmark(name) if name in MODULES else None
    lacking = [field for field in chosen.item_fields if any(field not in item for item in items)] if chosen else []
    if chosen and not lacking:
        return chosen.statistic(items), chosen.title, chosen.unit, ""
    scores = [float(item["score"]) for item in items]
    note = f"items lack {', '.join(lacking)}: mean score instead of {chosen.headline}" if chosen else ""
    scale, unit = (100.0, "%") if all(0 <= score <= 1 for score in scores) else (1.0, "score")
    title = chosen.title if chosen else name
    if items and all("equal_parts" in item for item in items):
        return mean_of_parts([item["equal_parts"] for item in items], scores, scale), title, unit, note
    return mean_statistic(scores, scale=scale), title, unit, note


def mean(values: Sequence[float]) -> float:
    """Plain mean in the order given, as the official scripts add; 0.0 of nothing."""
    return float(sum(values)) / len(values) if values else 0.0


def mean_statistic(values: Sequence[float], counted: Sequence[bool] | None = None, scale: float = 100.0) -> Statistic:
    """The statistic ``scale x mean``, over the questions that count."""
    weight = np.ones(len(values)) if counted is None else np.asarray(counted, dtype=float)
    sums = np.stack([np.asarray(values, dtype=float) * weight, weight], axis=1)
    return Statistic(sums, lambda totals: scale * ratio(totals[..., 0], totals[..., 1]), counted=weight > 0)


def mean_of_parts(parts: Sequence[str], scores: Sequence[float], scale: float) -> Statistic:
    """The statistic ``scale x mean over the parts of the mean score of a part``."""
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


def by_group(items: Sequence[Item], group: str, field: str = "score") -> dict[str, list[float]]:
    """Values of a field, listed by another field, groups in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(str(item[group]), []).append(float(item[field]))
    return groups


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested dictionaries under dotted names: ``{"a": {"b": 1}}`` is ``{"a.b": 1.0}``."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = float(value)
    return flat


def data_digest(chosen: Benchmark, folder: Path) -> str:
    """One SHA-256 over the names and contents of a benchmark's annotation files."""
    paths = sorted({path for pattern in chosen.annotations for path in folder.glob(pattern) if path.is_file()})
    return sha256_text("".join(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n" for path in paths))


def need_file(folder: Path, *patterns: str, benchmark_name: str, where: str) -> Path:
    """The first file below ``folder`` that fits a pattern; FileNotFoundError says what to put where."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; --data is LLaVA's evaluation folder of {benchmark_name}")
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found[0]
    raise FileNotFoundError(f"{folder} has no {' or '.join(patterns)}, needed to score {benchmark_name}; {where}")


def optional_file(folder: Path, *patterns: str) -> Path | None:
    """The first file below ``folder`` that fits a pattern, or None."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found[0]
    return None
