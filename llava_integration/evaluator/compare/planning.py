"""The power of a comparison that has not been run yet, from the noise of pilot scores."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_integration.evaluator.benchmarks.benchmark import Statistic
from llava_integration.evaluator.compare.comparison import largest_difference
from llava_integration.evaluator.compare.estimate import combine
from llava_integration.evaluator.compare.pairing import (
    MIN_OVERLAP,
    one_sided_notes,
    ordered,
    paired_runs,
)
from llava_integration.evaluator.compare.sides import Side
from llava_integration.evaluator.compare.statistics import (
    POWER,
    Paired,
    added_clusters,
    influences,
    pair,
    slips_of,
    values_of,
)
from llm2clip_plugin.bootstrap import expansion, t_quantile
from llm2clip_plugin.errors import ContractError

CORRELATION = 0.5  # of the two sides' scores over images, where one is known
MOST_TIMES = 1e6  # as many times the images at most
MANY = 1_000_000  # degrees of freedom of a spread that is given
PLAN = (
    "benchmark",
    "images",
    "runs a side",
    "detectable",
    "images needed",
    "of these",
    "varies by",
)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a difference on one benchmark varies by, in the benchmark's unit."""

    title: str
    unit: str
    images: int
    strata: int  # groups that images are drawn within
    image_error: float  # standard error of the difference over this many images, however many runs
    # more of it with one run a side: what trainings make of an image; 0 if runs can't tell
    answer_error: float
    # standard deviation of one side's score over trainings, apart from that; None: unknown
    spread: float | None
    spread_freedom: int = MANY  # degrees of freedom that ``spread`` was estimated with
    span: float = math.inf  # the largest difference that there can be

    @property
    def is_known(self) -> bool:
        """Whether the pilot says anything about images: more of them than groups."""
        return self.images > self.strata

    def error(self, images: float, runs: int) -> tuple[float, float]:
        """Standard error of the difference, and its degrees of freedom, with that many images and
        runs a side."""
        times = self.images / images
        over_images = self.image_error**2 * times
        answers = self.answer_error**2 * times
        over_runs = (self.spread or 0.0) ** 2
        freedom_of_runs = runs - 1
        if runs == 1:
            # one run estimates nothing: the spread is given, and slips vary over images
            over_images += answers
            freedom_of_runs = self.spread_freedom
        else:
            over_runs += answers / 2
        parts = [(over_images, max(1, round(images) - self.strata))]
        if over_runs and runs == 1:
            parts.append((2 * over_runs, freedom_of_runs))  # one spread, of both sides
        elif over_runs:
            parts += [(over_runs / runs, freedom_of_runs)] * 2  # of each side
        return combine(parts)

    def detectable(self, images: float, runs: int, *, level: float = 0.95) -> float:
        """The true difference that is detected with this power."""
        error, freedom = self.error(images, runs)
        reach = t_quantile(0.5 + level / 2, freedom) + t_quantile(POWER, freedom)
        return reach * error

    def images_needed(
        self, effect: float, runs: int, *, level: float = 0.95
    ) -> int | None:
        """How many images detect ``effect`` with ``runs`` a side; None if no number does, for the
        runs' spread."""

        def detects(images: float) -> bool:
            return self.detectable(images, runs, level=level) <= effect

        if not detects(self.images * MOST_TIMES):
            return None
        counts = range(self.strata + 1, math.ceil(self.images * MOST_TIMES))
        return counts[0] + bisect_left(counts, True, key=detects)


def plan(
    sides: Sequence[Side],
    *,
    spread: float | None = None,
    min_overlap: float = MIN_OVERLAP,
) -> tuple[list[Noise], list[str]]:
    """The noise of every benchmark of the base, or of both sides, and notes on those that are left
    out, or on what a side left out of its logs. With one side, the other is taken to vary as much
    over images, correlated by CORRELATION: the difference has 2 (1 - CORRELATION) times the
    variance. ``spread`` replaces what the runs show. Raises ValueError for more than two sides,
    ContractError if no benchmark is left."""
    if len(sides) > 2:
        raise ValueError(
            f"--plan takes one side or two, got {len(sides)}: "
            + ", ".join(side.name for side in sides)
        )
    base = sides[0]
    new = sides[-1]
    names = ordered(set(base.runs) & set(new.runs))
    if not names:
        raise ValueError(f"{base.name} and {new.name} have no benchmark in common")
    notes = [note for side in sides for note in side.notes]
    if new is not base:
        notes += one_sided_notes(base, new)
    noises = []
    problems = []
    for name in names:
        try:
            noises.append(measure(base, new, name, spread, min_overlap))
        except ContractError as error:
            problems.append(error)
    if not noises:
        raise problems[0]
    notes += [f"not planned: {problem}" for problem in problems]
    return noises, list(dict.fromkeys(notes))


def measure(
    base: Side, new: Side, name: str, spread: float | None, min_overlap: float
) -> Noise:
    """The noise of one benchmark."""
    base_runs, new_runs, _ = paired_runs(name, base, new, min_overlap=min_overlap)
    first = base_runs[0]
    base_statistics = [run.statistic for run in base_runs]
    new_statistics = [run.statistic for run in new_runs]
    paired = pair(base_statistics, new_statistics, first.clusters)
    base_MC, new_MC = influences(paired)
    if new is base:
        difference_MC = base_MC * math.sqrt(2 * (1 - CORRELATION))
    else:
        count = min(len(base_MC), len(new_MC))
        difference_MC = new_MC[:count] - base_MC[:count]
    # what one run a side adds to the variance over images that all runs share
    slips = slips_of(difference_MC)
    variance = float(np.sum(difference_MC**2, axis=1).mean())
    strata = len(np.unique(paired.strata))
    wider = expansion(paired.clusters, max(1, paired.clusters - strata))
    shared = max(0.0, variance - slips) * wider**2
    span = largest_difference([*base_runs, *new_runs])
    # a base that varies says nothing of how often another side agrees with it
    if new is not base or np.allclose(base_MC, 0):
        shared += doubt(paired, base_MC, new_MC, span)
    noise = Noise(
        title=first.title,
        unit=first.unit,
        images=paired.clusters,
        strata=strata,
        image_error=math.sqrt(shared),
        answer_error=math.sqrt(slips) * wider,
        spread=spread,
        span=span,
    )
    if spread is not None:
        return noise
    measured = [base_statistics] if new is base else [base_statistics, new_statistics]
    return with_measured_spread(noise, measured)


def with_measured_spread(noise: Noise, sides: Sequence[Sequence[Statistic]]) -> Noise:
    """The noise with the pooled standard deviation over runs, without what is counted over images;
    unchanged if no side has several runs."""
    squares = 0.0
    freedom = 0
    for statistics in sides:
        values = [statistic.full() for statistic in statistics]
        if len(values) > 1:
            squares += float(np.var(values, ddof=1)) * (len(values) - 1)
            freedom += len(values) - 1
    if not freedom:
        return noise
    luck = max(0.0, squares / freedom - noise.answer_error**2 / 2)
    return replace(noise, spread=math.sqrt(luck), spread_freedom=freedom)


def doubt(
    paired: Paired, base_MC: np.ndarray, new_MC: np.ndarray, span: float
) -> float:
    """The variance that a comparison adds for differences that are all alike: that a pilot saw no
    disagreement is not that there is none."""
    base = values_of(paired, paired.base).mean()
    new = values_of(paired, paired.new).mean()
    influence_C = new_MC.mean(axis=0) - base_MC.mean(axis=0)
    contribution_C = influence_C + (new - base) * paired.weights
    added, size = added_clusters(paired, contribution_C, span)
    return added * size**2


def plan_rows(
    noises: Sequence[Noise], *, effect: float, runs: Sequence[int], level: float
) -> Iterator[tuple[str, ...]]:
    """The rows under PLAN: per benchmark and number of runs what is detectable, and what ``effect``
    needs."""
    for noise in noises:
        title = noise.title if noise.unit == "%" else f"{noise.title} ({noise.unit})"
        images = str(noise.images)
        if not noise.is_known:
            pilot = f"{images} images, each of its group"
            if noise.images == 1:
                pilot = "1 image"
            varies = f"unknown from {pilot}"
            yield (title, images, "", "unknown", "unknown", "", varies)
            continue
        over_images = math.hypot(noise.image_error, noise.answer_error)
        varies = f"{over_images:.2f} over images"
        counts: Sequence[int] = (1,)
        if noise.spread is not None:
            varies += f", {noise.spread:.2f} over trainings"
            counts = runs
        for count in counts:
            detectable = noise.detectable(noise.images, count, level=level)
            needed = noise.images_needed(effect, count, level=level)
            needed_text = "no number"
            times = ""
            if needed:
                needed_text = str(needed)
                times = f"x {needed / noise.images:.2g}"
            detectable_text = f"{detectable:.2f}"
            reason = varies
            if detectable >= noise.span:
                detectable_text = "none"
                reason = f"{varies}: too much to detect any difference with so few"
            cells = (title, images, str(count), detectable_text)
            yield (*cells, needed_text, times, reason)
