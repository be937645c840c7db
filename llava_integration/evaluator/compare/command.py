"""``llm2clip compare``: is the new model better? With ``--plan``: how many images, or trainings, a
difference needs."""

import json
import math
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from llava_integration.evaluator.compare.comparison import build, largest_difference
from llava_integration.evaluator.compare.pairing import (
    MIN_OVERLAP,
    ordered,
    paired_runs,
)
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.report import page, table, text
from llava_integration.evaluator.compare.sides import Side, load_models, load_sides
from llava_integration.evaluator.compare.statistics import (
    Paired,
    added_clusters,
    combine,
    influences,
    pair,
    slips_of,
)
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.bootstrap import expansion, t_quantile
from llm2clip_plugin.options import Command, setting
from llm2clip_plugin.outside import printable_lines

WORSE_STATUS = 4  # exit status of --fail-on worse


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two or more sides, and how they are compared."""

    base: Path = setting(help="score file, log or folder of the baseline")
    new: tuple[Path, ...] = setting(
        (), help="score files, logs or folders to compare with BASE"
    )
    all_pairs: bool = setting(
        False, help="compare every two sides, not each with BASE alone"
    )
    names: tuple[str, ...] = setting(
        (), help="names of the sides in the report, base first"
    )
    output: Path | None = setting(
        None,
        help="folder for compare.json, compare.md and compare.html",
        needs="not plan",
    )
    level: float = setting(0.95, help="confidence level of the intervals and verdicts")
    same_model: bool = setting(
        False,
        help="logs of one benchmark with several model names are runs (seeds) of one model",
    )
    min_overlap: float = setting(
        MIN_OVERLAP,
        help="fraction of a benchmark's items that both sides must have; others are left out",
    )
    fail_on: Literal["nothing", "worse"] = setting(
        "nothing",
        help="worse: exit with status 4 if a new side is worse on some benchmark",
        needs="not plan",
    )
    group: str = setting("", help="field of the logs: items with one value go together")
    metric: str = setting(
        "", help="metric of a log, or column of a table; none: the first"
    )
    filter: str = setting("", help="filter of the harness; none: the first")
    scorer: str = setting("", help="scorer of inspect_ai; none: the headline's")
    references: bool = setting(True, help="show the published numbers")
    image_folder: Path | None = setting(
        None,
        help="folder of the page's pictures: LLaVA's playground/data/eval, or one benchmark's "
        "folder; none: the data that the answers were scored with",
    )
    questions: int = setting(
        80,
        help="questions per benchmark in the page's browser, wins and losses evenly",
    )
    plan: bool = setting(
        False,
        help="before running anything: print how many images and runs (seeds) --effect needs, from "
        "the noise of pilot scores: BASE alone, or BASE and NEW",
    )
    effect: float = setting(
        1.0,
        help="with --plan: the difference to detect, in the benchmark's unit",
        needs="plan",
    )
    runs: tuple[int, ...] = setting(
        (1, 3, 5),
        help="with --plan: numbers of runs a side",
        needs="plan",
    )
    spread: float | None = setting(
        None,
        help="with --plan: standard deviation over trainings; none: that of BASE's runs",
        needs="plan",
    )

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("level", 0.5 <= self.level < 1, "a number in [0.5, 1)"),
            ("min-overlap", 0 <= self.min_overlap <= 1, "a number in [0, 1]"),
            ("effect", self.effect > 0, "a number above 0"),
            ("runs", min(self.runs, default=0) > 0, "whole numbers above 0"),
            ("output", self.output is None or not self.output.is_file(), "a folder"),
            (
                "image-folder",
                self.image_folder is None or self.image_folder.is_dir(),
                "a folder",
            ),
        ):
            if not fits:
                value = getattr(self, name.replace("-", "_"))
                written = (
                    " ".join(map(str, value)) if isinstance(value, tuple) else value
                )
                raise ValueError(f"--{name} {written} is invalid; expected {expected}")


COMMAND = Command(
    name="compare",
    example="llm2clip compare runs/openai/scores runs/llm2clip/scores --output report",
    about="Is the new model better? Paired statistics over score files, or over the logs of "
    "lmms-eval, lm-evaluation-harness (--log_samples), VLMEvalKit and inspect_ai, or tables (CSV, "
    "JSONL) of item, score and group. Several files of one benchmark in a folder are its runs "
    "(seeds).",
    settings=CompareConfig,
    arguments="base new",
    everyday="names all-pairs output level metric group fail-on image-folder plan effect",
)


def main(argv: list[str] | None = None) -> int:
    """Compare score files and write the reports."""
    args = COMMAND.parse(sys.argv[1:] if argv is None else argv)
    sides = sides_of(args)
    if args.plan:
        print_plan(sides, args)
        return 0
    comparison = build(
        sides,
        level=args.level,
        references=args.references,
        all_pairs=args.all_pairs,
        min_overlap=args.min_overlap,
    )
    if args.output:  # before printing, which `| head` may end
        reports = {
            "json": json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False)
            + "\n",
            "md": f"# Comparison\n\n{text(comparison)}",
            "html": page(
                comparison, sides, images=args.image_folder, questions=args.questions
            ),
        }
        for ending, report in reports.items():
            print(
                f"wrote {write_text(args.output / f'compare.{ending}', report)}",
                file=sys.stderr,
            )
    print(printable_lines(text(comparison)))  # names in it come from score files
    is_worse = any(row.verdict == "worse" for row in comparison.rows)
    if is_worse and args.fail_on == "worse":
        return WORSE_STATUS
    return 0


def sides_of(args: CompareConfig) -> list[Side]:
    """The sides that are named, or, of BASE alone, one for each of its models. Raises ValueError if
    there is but one."""
    choices = Choices(
        group=args.group, metric=args.metric, filter=args.filter, scorer=args.scorer
    )
    if args.new or args.plan:
        return load_sides(
            [args.base, *args.new],
            args.names,
            same_model=args.same_model,
            choices=choices,
        )
    sides = load_models(args.base, choices)
    if len(sides) < 2:
        raise ValueError(
            "compare needs a second side: BASE NEW, or a BASE with several models (a table with "
            "the column model); with one model, --plan says what a comparison needs"
        )
    if args.names and len(args.names) != len(sides):
        models = ", ".join(side.name for side in sides)
        raise ValueError(f"{len(args.names)} --names for {len(sides)} models: {models}")
    if args.names:
        return [
            replace(side, name=name)
            for side, name in zip(sides, args.names, strict=True)
        ]
    return sides


def print_plan(sides: Sequence[Side], args: CompareConfig) -> None:
    """Print how many images and runs a difference needs."""
    noises = plan(sides, spread=args.spread)
    lines = table(
        PLAN, plan_rows(noises, effect=args.effect, runs=args.runs, level=args.level)
    )
    test = f"with {POWER:.0%} power, two-sided at {1 - args.level:.0%}"
    print(f"A difference of {args.effect:g} {test}:\n")
    print(printable_lines("\n".join(lines)))
    if any(noise.spread is None for noise in noises):
        print(
            "\nVariation over trainings is unknown: score several runs a side, or set --spread"
        )


# The power of a comparison that has not been run yet

POWER = 0.8  # probability of detecting the difference
CORRELATION = 0.5  # of the two sides' scores over images, where one is known
MOST_TIMES = 1e6  # as many times the images at most
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
    spread_freedom: int = (
        1_000_000  # degrees of freedom that ``spread`` was estimated with
    )

    @property
    def is_known(self) -> bool:
        """Whether the pilot says anything about images: more of them than groups."""
        return self.images > self.strata

    def error(self, images: float, runs: int) -> tuple[float, float]:
        """Standard error of the difference, and its degrees of freedom, with that many images and
        runs a side."""
        times = self.images / images
        answers = self.answer_error**2 * self.images / images
        # one run estimates nothing: the spread is given, and slips vary over images
        alone = runs == 1
        shared = self.image_error**2 * times + (answers if alone else 0.0)
        of_one = ((self.spread or 0.0) ** 2 + (0.0 if alone else answers / 2)) / runs
        parts = [(shared, max(1, round(images) - self.strata))]
        if of_one:
            parts += [(of_one, self.spread_freedom if alone else runs - 1)] * 2
        return combine(parts)

    def detectable(self, images: float, runs: int, *, level: float = 0.95) -> float:
        """The true difference that is detected with this power."""
        error, freedom = self.error(images, runs)
        return (
            t_quantile(0.5 + level / 2, freedom) + t_quantile(POWER, freedom)
        ) * error

    def images_needed(
        self, effect: float, runs: int, *, level: float = 0.95
    ) -> int | None:
        """How many images detect ``effect`` with ``runs`` a side; None if no number does, for the
        runs' spread."""
        if self.detectable(self.images * MOST_TIMES, runs, level=level) > effect:
            return None
        counts = range(self.strata + 1, math.ceil(self.images * MOST_TIMES))
        enough = bisect_left(
            counts,
            True,
            key=lambda images: self.detectable(images, runs, level=level) <= effect,
        )
        return counts[0] + enough


def plan(sides: Sequence[Side], *, spread: float | None = None) -> list[Noise]:
    """The noise of every benchmark of the base, or of both sides. With one side, the other is taken
    to vary as much over images, correlated by CORRELATION: the difference has 2 (1 - CORRELATION)
    times the variance. ``spread`` replaces what the runs show. Raises ValueError for more than two
    sides, ContractError for other questions."""
    if len(sides) > 2:
        raise ValueError(
            f"--plan takes one side or two, got {len(sides)}: "
            + ", ".join(side.name for side in sides)
        )
    base = sides[0]
    new = sides[-1]
    if not (names := ordered(set(base.runs) & set(new.runs))):
        raise ValueError(f"{base.name} and {new.name} have no benchmark in common")
    return [measure(base, new, name, spread) for name in names]


def measure(base: Side, new: Side, name: str, spread: float | None) -> Noise:
    """The noise of one benchmark."""
    base_runs, new_runs, _ = paired_runs(name, base, new)
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
    shared = max(0.0, float(np.sum(difference_MC**2, axis=1).mean()) - slips)
    strata = len(np.unique(paired.strata))
    wider = expansion(paired.clusters, max(1, paired.clusters - strata))
    shared = shared * wider**2
    # a base that varies says nothing of how often another side agrees with it
    if new is not base or np.allclose(base_MC, 0):
        shared += doubt(
            paired, base_MC, new_MC, largest_difference([*base_runs, *new_runs])
        )
    noise = Noise(
        title=first.title,
        unit=first.unit,
        images=paired.clusters,
        strata=strata,
        image_error=math.sqrt(shared),
        answer_error=math.sqrt(slips) * wider,
        spread=spread,
    )
    measured = [base_statistics] if new is base else [base_statistics, new_statistics]
    values: list[list[float]] = []
    for side in measured:
        if len(side) > 1:
            values.append([run.full() for run in side])
    freedom = sum(len(side) - 1 for side in values)
    if spread is not None or not freedom:
        return noise
    # the pooled standard deviation over runs, without what is counted over images
    squares = sum(float(np.var(side, ddof=1)) * (len(side) - 1) for side in values)
    luck = max(0.0, squares / freedom - noise.answer_error**2 / 2)
    return replace(noise, spread=math.sqrt(luck), spread_freedom=freedom)


def doubt(
    paired: Paired, base_MC: np.ndarray, new_MC: np.ndarray, span: float
) -> float:
    """The variance that a comparison adds for differences that are all alike: that a pilot saw no
    disagreement is not that there is none."""
    value = paired.statistic.value
    base = np.mean([float(value(run_CK.sum(axis=0))) for run_CK in paired.base])
    new = np.mean([float(value(run_CK.sum(axis=0))) for run_CK in paired.new])
    influence_C = new_MC.mean(axis=0) - base_MC.mean(axis=0)
    weight_C = paired.weights
    added, size = added_clusters(paired, influence_C + (new - base) * weight_C, span)
    return added * size**2


def plan_rows(
    noises: Sequence[Noise], *, effect: float, runs: Sequence[int], level: float
) -> Iterator[tuple[str, ...]]:
    """The rows under PLAN: per benchmark and number of runs what is detectable, and what ``effect``
    needs."""
    for noise in noises:
        title = noise.title if noise.unit == "%" else f"{noise.title} ({noise.unit})"
        if not noise.is_known:
            images = (
                "1 image"
                if noise.images == 1
                else f"{noise.images} images, each of its group"
            )
            yield (
                title,
                str(noise.images),
                "",
                "unknown",
                "unknown",
                "",
                f"unknown from {images}",
            )
            continue
        varies = f"{math.hypot(noise.image_error, noise.answer_error):.2f} over images"
        if noise.spread is not None:
            varies += f", {noise.spread:.2f} over trainings"
        for count in runs if noise.spread is not None else (1,):
            needed = noise.images_needed(effect, count, level=level)
            yield (
                title,
                str(noise.images),
                str(count),
                f"{noise.detectable(noise.images, count, level=level):.2f}",
                str(needed or "no number"),
                f"x {needed / noise.images:.2g}" if needed else "",
                varies,
            )


if __name__ == "__main__":
    sys.exit(main())
