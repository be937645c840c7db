"""A comparison: score files paired by question id, statistics for each benchmark and pair of sides."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_integration.benchmarks.benchmark import Item, Statistic, mean_of_parts, mean_statistic
from llava_integration.benchmarks.rules import benchmarks, published
from llava_integration.compare.sides import Side
from llava_integration.compare.statistics import (
    Difference,
    Paired,
    combine,
    compare,
    counted,
    holm,
    pair,
    resampled_values,
)
from llm2clip_plugin.bootstrap import expansion, t_quantile
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError

EMPTY = 0.1  # fraction of empty answers above which a score is not the model's
FEWEST_IN_COMMON = 0.9  # fraction of questions that both sides must have


@dataclass(frozen=True, kw_only=True)
class Row:
    """New against base on one benchmark."""

    benchmark: str
    title: str
    unit: str
    base: str  # name of the base side
    new: str
    result: Difference
    p_holm: float  # adjusted over the benchmarks of this pair of sides
    wins: int  # questions with a higher score in new
    losses: int
    ties: int
    questions: int
    images: int
    runs: tuple[int, int]
    categories: dict[str, tuple[float, float, int]]  # mean score of base and of new, number of questions
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'no difference shown', at 5 % over all benchmarks."""
        if self.p_holm >= 0.05:
            return "no difference shown"
        return "better" if self.result.difference > 0 else "worse"

    def power_line(self) -> str:
        """The difference that this many questions can detect."""
        size, detectable = abs(self.result.difference), self.result.detectable
        start = f"{self.questions} questions on {self.images} images"
        if not detectable:
            return f"{start}; both sides have the same score on each"
        unit = "points" if self.unit == "%" else self.unit
        line = f"{start}: a difference of {detectable:.2f} {unit} is detectable with 80 % power"
        times = (detectable / size) ** 2 if size else 0.0
        return f"{line}; detecting {size:.2f} needs {times:.1f} times the questions" if 1 < times < 100 else line


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, the headline numbers of every side, and the settings."""

    names: tuple[str, ...]  # sides, base first
    rows: tuple[Row, ...]
    scores: dict[str, dict[str, float]]  # benchmark -> side -> headline number
    titles: dict[str, str]
    units: dict[str, str]
    references: dict[str, dict[str, float]]  # model -> benchmark -> published number
    settings: dict[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()  # what makes numbers meaningless; before everything else in every report

    def pairs(self) -> list[tuple[str, list[Row]]]:
        """Rows by the side that is compared with the base."""
        return [(name, [row for row in self.rows if row.new == name]) for name in self.names[1:]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the verdicts and power lines."""
        return {**asdict(self), "rows": [_row_dict(row) for row in self.rows]}


def _row_dict(row: Row) -> dict[str, Any]:
    body = asdict(row)
    result = body.pop("result")
    return {
        **body,
        "base_score": result.pop("base"),
        "new_score": result.pop("new"),
        **result,
        "interval": [row.result.low, row.result.high],
        "verdict": row.verdict,
        "power": row.power_line(),
    }


def build(
    sides: Sequence[Side],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    references: bool = True,
) -> Comparison:
    """Compare every side with the first."""
    base, *others = sides
    notes = [note for side in sides for note in side.notes]
    tasks = [(new, name) for new in others for name in ordered(set(base.runs) & set(new.runs))]
    for new in others:
        if not set(base.runs) & set(new.runs):
            raise ValueError(
                f"{base.name} ({', '.join(ordered(base.runs))}) and {new.name} ({', '.join(ordered(new.runs))}) have "
                "no benchmark in common"
            )
        for name in ordered(set(base.runs) ^ set(new.runs)):
            notes.append(f"{name} is not compared: only {base.name if name in base.runs else new.name} has its scores")
    bar = tqdm(tasks, desc="comparing", unit="benchmark", delay=2)
    rows = [compare_benchmark(base, new, name, resamples=resamples, level=level, seed=seed) for new, name in bar]
    rows = [row for new in others for row in _adjust([row for row in rows if row.new == new.name])]
    titles, units, scores = _scores(sides)
    shared = {row.benchmark for row in rows}
    return Comparison(
        names=tuple(side.name for side in sides),
        rows=tuple(rows),
        scores=scores,
        titles=titles,
        units=units,
        references={
            label: {name: value for name, value in values.items() if name in shared}
            for label, values in published().items()
            if references and shared & set(values)
        },
        settings={"resamples": resamples, "level": level, "seed": seed},
        notes=tuple(dict.fromkeys(notes)),
        warnings=tuple(warnings(sides, titles)),
    )


def warnings(sides: Sequence[Side], titles: dict[str, str]) -> Iterator[str]:
    """Empty answers that are more than EMPTY of a side's, and sides in different precisions."""
    for side in sides:
        for name, records in side.runs.items():
            empty = sum(record.counts.get("empty", 0) for record in records)
            total = sum(record.counts.get("answered", 0) for record in records)
            if empty > EMPTY * total:
                yield f"{empty} of the {total} answers of {side.name} to {titles[name]} are empty"
    for field in ("precision", "dtype"):
        used = {
            side.name: "/".join(sorted(values))
            for side in sides
            if (values := {str(r.provenance.get(field, "")) for records in side.runs.values() for r in records} - {""})
        }
        if len(set(used.values())) > 1:
            listed = ", ".join(f"{name} in {value}" for name, value in used.items())
            yield f"the sides differ in their {field}, which alone may move scores: {listed}"


def _adjust(rows: Sequence[Row]) -> list[Row]:
    """Rows with Holm's p over the benchmarks of one pair of sides."""
    adjusted = holm([row.result.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _scores(sides: Sequence[Side]) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, float]]]:
    """Titles, units and the headline numbers of every side, each over all of its own questions."""
    titles, units, scores = {}, {}, {}
    for name in ordered(name for side in sides for name in side.runs):
        scores[name] = {}
        for side in sides:
            values = []
            for record in side.runs.get(name, ()):
                statistic, titles[name], units[name], _ = statistic_of(name, record.items)
                values.append(statistic.full())
            if values:
                scores[name][side.name] = sum(values) / len(values)
    return titles, units, scores


def clusters_of(items: list[dict[str, Any]]) -> list[str]:
    """What is resampled together: the questions of an image, where a benchmark says so."""
    return [str(item.get("cluster", item["id"])) for item in items]


def compare_benchmark(base: Side, new: Side, name: str, *, resamples: int, level: float, seed: int) -> Row:
    """One benchmark: pair the questions, resample, count wins."""
    base_runs, new_runs = base.runs[name], new.runs[name]
    common, notes = questions_in_common(name, base, new)
    base_items, new_items = ([pick(record, common) for record in runs] for runs in (base_runs, new_runs))
    statistics = [[statistic_of(name, items) for items in side] for side in (base_items, new_items)]
    _, title, unit, note = statistics[0][0]
    clusters = clusters_of(base_items[0])
    of_base, of_new = ([entry[0] for entry in side] for side in statistics)
    result = compare(pair(of_base, of_new, clusters), resamples=resamples, level=level, seed=seed)
    keep = [place for place, counts in enumerate(counted([*of_base, *of_new])) if counts]
    old, now = ([scores[place] for place in keep] for scores in map(_mean_scores, (base_items, new_items)))
    clusters = [clusters[place] for place in keep]
    wins = sum(b > a for a, b in zip(old, now, strict=True))
    losses = sum(b < a for a, b in zip(old, now, strict=True))
    if len(set(clusters)) == 1 and len(clusters) > 1:
        notes.append("all questions are about one image, so the interval is meaningless")
    return Row(
        benchmark=name,
        title=title,
        unit=unit,
        base=base.name,
        new=new.name,
        result=result,
        p_holm=result.p,
        wins=wins,
        losses=losses,
        ties=len(old) - wins - losses,
        questions=len(keep),
        images=len(set(clusters)),
        runs=(len(base_runs), len(new_runs)),
        categories=_categories([base_items[0][place] for place in keep], old, now),
        notes=tuple(dict.fromkeys([*notes, *([note] if note else []), *_fault_notes(base, new, name)])),
    )


def questions_in_common(name: str, base: Side, new: Side) -> tuple[list[str], list[str]]:
    """Ids that every run of both sides has, in the base's order, and notes; ContractError for other questions."""
    records = [*base.runs[name], *new.runs[name]]
    shared = set.intersection(*({str(item["id"]) for item in record.items} for record in records))
    largest = max(len(record.items) for record in records)
    if len(shared) < FEWEST_IN_COMMON * largest:
        sizes = ", ".join(str(len(record.items)) for record in records)
        raise ContractError(
            f"{name}: the score files of {base.name} and {new.name} share {len(shared)} questions of {sizes}; they "
            "were scored with different data or splits. Score both with the same --data"
        )
    order = [str(item["id"]) for item in records[0].items if str(item["id"]) in shared]
    truths = {str(item["id"]): item.get("truth") for item in records[0].items}
    for record in records[1:]:
        for item in record.items:
            identifier = str(item["id"])
            if identifier in shared and item.get("truth") != truths[identifier]:
                raise ContractError(
                    f"{name}: the truth of question {identifier} is {truths[identifier]!r} in {base.name} and "
                    f"{item.get('truth')!r} in {record.model}; score both with the same --data"
                )
    notes = [] if len(shared) == largest else [f"{largest - len(shared)} questions are not in every file; ignored"]
    if len({record.provenance.get("data_sha256", "") for record in records} - {""}) > 1:
        notes.append("the sides were scored with different annotation files; truths in common are equal")
    if len({record.provenance.get("layout", "") for record in records} & {"llava", "lmms_eval"}) > 1:
        notes.append("one side was evaluated with lmms-eval, the other with LLaVA's scripts; their prompts differ")
    return order, notes


def pick(record: ScoreFile, common: Sequence[str]) -> list[Item]:
    """The items of these ids, in their order."""
    items = {str(item["id"]): item for item in record.items}
    return [items[identifier] for identifier in common]


def _mean_scores(runs: Sequence[Sequence[Item]]) -> list[float]:
    """Each question's score, mean over runs."""
    return [sum(float(item["score"]) for item in question) / len(question) for question in zip(*runs, strict=True)]


def _categories(
    items: Sequence[Item], old: Sequence[float], now: Sequence[float]
) -> dict[str, tuple[float, float, int]]:
    """Mean scores by category, largest first."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(str(item.get("category") or ""), []).append(place)
    if len(groups) < 2:
        return {}
    return {
        key: (sum(old[p] for p in places) / len(places), sum(now[p] for p in places) / len(places), len(places))
        for key, places in sorted(groups.items(), key=lambda group: -len(group[1]))
    }


def _fault_notes(base: Side, new: Side, name: str) -> list[str]:
    """The notes of the score files, with the side's name; notes of both sides once, without a name."""
    base_notes, new_notes = (
        list(dict.fromkeys(note for record in side.runs[name] for note in record.notes)) for side in (base, new)
    )
    return [
        *(note if note in new_notes else f"{base.name}: {note}" for note in base_notes),
        *(f"{new.name}: {note}" for note in new_notes if note not in base_notes),
    ]


def ordered(names: Iterable[str]) -> list[str]:
    """Benchmarks in the order of tables, unknown ones last, by name."""
    known = list(benchmarks())
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def statistic_of(name: str, items: Sequence[Item]) -> tuple[Statistic, str, str, str]:
    """Statistic, title, unit and a note for a score file's items.

    An unknown benchmark, or items without what its composite needs, get the plain mean of their scores.
    """
    known = benchmarks().get(name)
    missing = [field for field in known.item_fields if any(field not in item for item in items)] if known else []
    if known and not missing:
        return known.statistic(items), known.title, known.unit, ""
    scores = [float(item["score"]) for item in items]
    note = f"items have no {', '.join(missing)}; mean score instead of {known.headline}" if known else ""
    scale, unit = (100.0, "%") if all(0 <= score <= 1 for score in scores) else (1.0, "score")
    title = known.title if known else name
    if items and all("equal_parts" in item for item in items):
        return mean_of_parts([item["equal_parts"] for item in items], scores, scale), title, unit, note
    return mean_statistic(scores, scale=scale), title, unit, note


# How many images, or trainings, a difference needs: the power of a comparison that has not been run yet.

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
        parts = [(self.image_error**2 * times + answers / runs, max(1, round(images) - self.strata))]
        if self.spread:
            of_one = (self.spread**2 + (answers / 2 if runs > 1 else 0)) / runs  # compare counts answers here, too
            freedom = runs - 1 if runs > 1 else self.spread_freedom  # one run estimates nothing: the spread is given
            parts += [(of_one, freedom), (of_one, freedom)]
        return combine(parts)

    def detectable(self, images: float, runs: int, *, level: float = 0.95, power: float = 0.8) -> float:
        """The true difference that is detected with this power."""
        error, freedom = self.error(images, runs)
        return (t_quantile(0.5 + level / 2, freedom) + t_quantile(power, freedom)) * error

    def images_needed(self, effect: float, runs: int, **test: float) -> int | None:
        """How many images detect ``effect`` with ``runs`` a side; None if no number does, for the runs' spread."""
        if self.detectable(self.images * MOST_TIMES, runs, **test) > effect:
            return None
        low, high = 0, math.ceil(self.images * MOST_TIMES)
        while high - low > 1:
            middle = (low + high) // 2
            enough = middle > self.strata and self.detectable(middle, runs, **test) <= effect
            low, high = (low, middle) if enough else (middle, high)
        return high

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
    common, _ = questions_in_common(name, base, new)
    picked = [[pick(record, common) for record in side.runs[name]] for side in (base, new)]
    _, title, unit, _ = statistic_of(name, picked[0][0])
    statistics = [[statistic_of(name, items)[0] for items in runs] for runs in picked]
    clusters = clusters_of(picked[0][0])
    paired = pair(statistics[0], statistics[1], clusters)
    image, answer = _image_errors(paired, resamples, seed, times_one_side)
    strata = len(np.unique(paired.strata))
    wider = expansion(paired.clusters, max(1, paired.clusters - strata))
    noise = Noise(
        title=title,
        unit=unit,
        questions=len(common),
        images=paired.clusters,
        strata=strata,
        image_error=image * wider,
        answer_error=answer * wider,
        spread=spread,
    )
    return noise if spread is not None else _with_spread(noise, statistics if new is not base else statistics[:1])


def _image_errors(paired: Paired, resamples: int, seed: int, times_one_side: float | None) -> tuple[float, float]:
    """Standard errors over images: what all runs share, and what one run a side adds.

    One run a side has the variance s + i, the means of M runs s + i / M.
    """

    def variance(base_MCK: np.ndarray, new_MCK: np.ndarray) -> float:
        part = replace(paired, base=base_MCK, new=new_MCK)
        base_R, new_R = resampled_values(part, resamples, np.random.default_rng(seed))
        return float(np.var(new_R - base_R)) if times_one_side is None else float(np.var(base_R)) * times_one_side**2

    runs = min(len(paired.base), len(paired.new))
    single = float(np.mean([variance(paired.base[[m]], paired.new[[m]]) for m in range(runs)]))
    if runs == 1:
        return math.sqrt(single), 0.0
    answers = max(0.0, single - variance(paired.base[:runs], paired.new[:runs])) * runs / (runs - 1)
    return math.sqrt(max(0.0, single - answers)), math.sqrt(answers)


def _with_spread(noise: Noise, statistics: Sequence[Sequence[Statistic]]) -> Noise:
    """The pooled standard deviation over runs, where a side has several, without what is counted over images."""
    values = [[run.full() for run in side] for side in statistics if len(side) > 1]
    freedom = sum(len(side) - 1 for side in values)
    if not freedom:
        return noise
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
