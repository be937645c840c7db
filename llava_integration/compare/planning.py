"""How many images, or trainings, a difference needs: the power of a comparison that has not been run yet."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_integration.compare.comparison import ordered, paired_runs
from llava_integration.compare.sides import Side
from llava_integration.compare.statistics import combine, pair, resampled_runs, slips_of
from llm2clip_plugin.bootstrap import expansion, t_quantile

MOST_RUNS = 1000  # more trainings than anyone can run
MOST_TIMES = 1e6  # as many times the images at most


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a difference on one benchmark varies by, in the benchmark's unit."""

    title: str
    unit: str
    questions: int
    images: int
    strata: int  # groups that images are drawn within
    image_error: float  # standard error of the difference over this many images, however many runs
    answer_error: float  # more of it with one run a side: what trainings make of an image; 0 if runs can't tell
    spread: float | None  # standard deviation of one side's score over trainings, apart from that; None: unknown
    spread_freedom: int = 1_000_000  # degrees of freedom that ``spread`` was estimated with

    def error(self, images: float, runs: int) -> tuple[float, int]:
        """Standard error of the difference, and its degrees of freedom, with that many images and runs a side."""
        times, answers = self.images / images, self.answer_error**2 * self.images / images
        alone = runs == 1  # one run estimates nothing: the spread is given, and slips vary over images
        shared = self.image_error**2 * times + (answers if alone else 0.0)
        of_one = ((self.spread or 0.0) ** 2 + (0.0 if alone else answers / 2)) / runs
        parts = [(shared, max(1, round(images) - self.strata))]
        if of_one:
            parts += [(of_one, self.spread_freedom if alone else runs - 1)] * 2
        return combine(parts)

    def detectable(self, images: float, runs: int, *, level: float = 0.95, power: float = 0.8) -> float:
        """The true difference that is detected with this power."""
        error, freedom = self.error(images, runs)
        return (t_quantile(0.5 + level / 2, freedom) + t_quantile(power, freedom)) * error

    def images_needed(self, effect: float, runs: int, **test: float) -> int | None:
        """How many images detect ``effect`` with ``runs`` a side; None if no number does, for the runs' spread."""
        if self.detectable(self.images * MOST_TIMES, runs, **test) > effect:
            return None
        counts = range(self.strata + 1, math.ceil(self.images * MOST_TIMES))
        return counts[0] + bisect_left(counts, True, key=lambda images: self.detectable(images, runs, **test) <= effect)

    def runs_needed(self, effect: float, **test: float) -> int | None:
        """How many runs a side detect ``effect`` on these images; None if no number does, or the spread is unknown."""
        if self.spread is None or self.detectable(self.images, MOST_RUNS, **test) > effect:
            return None
        counts = range(2 if self.spread else 1, MOST_RUNS + 1)
        return next(runs for runs in counts if self.detectable(self.images, runs, **test) <= effect)


def plan(
    sides: Sequence[Side],
    *,
    spread: float | None = None,
    correlation: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Noise]:
    """The noise of every benchmark of the base, or of both sides where there are two.

    With one side, the other is taken to vary as much over images, with ``correlation`` between the two, so that the
    difference has the variance 2 (1 - correlation) times that of the side. ``spread``, if given, replaces what the
    runs show. Raises ValueError for more than two sides, ContractError for sides with other questions.
    """
    if len(sides) > 2:
        raise ValueError(f"--plan takes one side or two, got {len(sides)}: " + ", ".join(side.name for side in sides))
    base, new = sides[0], sides[-1]
    names = ordered(set(base.runs) & set(new.runs))
    if not names:
        raise ValueError(f"{base.name} and {new.name} have no benchmark in common")
    times = math.sqrt(2 * (1 - correlation)) if base is new else None
    return [_measure(base, new, name, spread, times, resamples, seed) for name in names]


def _measure(
    base: Side, new: Side, name: str, spread: float | None, times_one_side: float | None, resamples: int, seed: int
) -> Noise:
    *runs, _ = paired_runs(name, base, new)
    first = runs[0][0]
    statistics = [[run.statistic for run in side] for side in runs]
    paired = pair(statistics[0], statistics[1], first.clusters)
    count = min(len(paired.base), len(paired.new))
    base_MR, new_MR = (side[:count] for side in resampled_runs(paired, resamples, np.random.default_rng(seed)))
    difference_MR = new_MR - base_MR if times_one_side is None else base_MR * times_one_side
    slips = slips_of(difference_MR)  # what one run a side adds to the variance over images that all runs share
    shared = max(0.0, float(np.var(difference_MR, axis=1).mean()) - slips)
    strata = len(np.unique(paired.strata))
    wider = expansion(paired.clusters, max(1, paired.clusters - strata))
    noise = Noise(
        title=first.title,
        unit=first.unit,
        questions=len(first.ids),
        images=paired.clusters,
        strata=strata,
        image_error=math.sqrt(shared) * wider,
        answer_error=math.sqrt(slips) * wider,
        spread=spread,
    )
    measured = statistics if new is not base else statistics[:1]
    values = [[run.full() for run in side] for side in measured if len(side) > 1]
    freedom = sum(len(side) - 1 for side in values)
    if spread is not None or not freedom:
        return noise
    # the pooled standard deviation over runs, without what is counted over images
    squares = sum(float(np.var(side, ddof=1)) * (len(side) - 1) for side in values)
    luck = max(0.0, squares / freedom - noise.answer_error**2 / 2)
    return replace(noise, spread=math.sqrt(luck), spread_freedom=freedom)


def lines(noises: Sequence[Noise], *, effect: float, runs: Sequence[int], level: float, power: float) -> list[str]:
    """The plan as text: per benchmark what is detectable, and what ``effect`` needs."""
    test = {"level": level, "power": power}
    lines = [f"A difference of {effect:g} with {power:.0%} power, two-sided at {1 - level:.0%}:"]
    for noise in noises:
        of = "points" if noise.unit == "%" else noise.unit
        over_images = f"varies by {math.hypot(noise.image_error, noise.answer_error):.2f} {of} over images"
        trainings = "; over trainings unknown: score several runs a side, or set --spread"
        if noise.spread is not None:
            trainings = f", by {noise.spread:.2f} over trainings"
        lines += [
            "",
            f"{noise.title}: {noise.questions} questions on {noise.images} images",
            f"  {over_images}{trainings}",
        ]
        for count in runs if noise.spread is not None else runs[:1]:
            of_runs = "these trainings only" if noise.spread is None else f"{count} run{'s' * (count > 1)} a side"
            needed = noise.images_needed(effect, count, **test)
            images = f"{needed} images ({needed / noise.images:.2g} times these)" if needed else "what no images give"
            detectable = f"{noise.detectable(noise.images, count, **test):.2f} {of} detectable"
            lines.append(f"  {of_runs}: {detectable}; {effect:g} needs {images}")
        if noise.spread:
            enough = noise.runs_needed(effect, **test)
            lines.append(f"  on these images: {f'{enough} runs a side' if enough else 'no number of runs detects it'}")
    return lines
