"""A comparison of sides: a row for each benchmark, with its statistics and verdict."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, compress
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_integration.evaluator.benchmarks.rules import benchmarks
from llava_integration.evaluator.compare.blind import (
    BlindLogs,
    Part,
    adjusted_parts,
    split,
)
from llava_integration.evaluator.compare.cautions import copy_notes, warnings
from llava_integration.evaluator.compare.multiplicity import (
    holm,
    holm_factors,
    letters,
)
from llava_integration.evaluator.compare.pairing import (
    MIN_OVERLAP,
    benchmarks_in_common,
    check_scales,
    in_one_unit,
    matched_by_number,
    one_sided_notes,
    ordered,
    paired_runs,
)
from llava_integration.evaluator.compare.readers import BITS, PERPLEXITY
from llava_integration.evaluator.compare.sides import Run, Side, with_common_task
from llava_integration.evaluator.compare.statistics import (
    Difference,
    compare,
    counted,
    pair,
)
from llm2clip_plugin.errors import ContractError

NOTHING_PAIRED = (
    "--paired-runs has no effect: each side has one run of each benchmark; runs are files of one "
    "benchmark in a folder, or of a table with the columns task and run"
)

Task = tuple[Side, Side, str]  # base, new, benchmark
RowKey = tuple[str, str, str]  # their names


@dataclass(frozen=True, kw_only=True)
class Row:
    """New against base on one benchmark."""

    benchmark: str
    title: str
    unit: str
    base: str  # name of the base side
    new: str
    result: Difference
    p_holm: float  # adjusted over all rows of the comparison
    # adjusted as p_holm is: it excludes 0 if and only if there is a verdict
    interval: tuple[float, float]
    level: float  # of the verdict
    wins: int  # questions with a higher score in new
    losses: int
    ties: int
    questions: int
    images: int
    runs: tuple[int, int]
    # mean score of base and of new, number of questions; largest first
    categories: dict[str, tuple[float, float, int]]
    notes: tuple[str, ...]
    # with blind logs: the questions that are solved blind, and those that need eyes
    parts: tuple[Part, ...] = ()

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'no difference shown', with 1 - level over all rows."""
        if self.p_holm >= 1 - self.level:
            return "no difference shown"
        return "better" if self.result.difference > 0 else "worse"

    def power_line(self) -> str:
        """The difference that this many questions, and runs, can detect."""
        # a score has no unit
        unit = {"%": " points", "score": ""}.get(self.unit, f" {self.unit}")
        start = "1 item" if self.questions == 1 else f"{self.questions} items"
        if self.images != self.questions:
            start += f" in {self.images} clusters"
        if not self.wins and not self.losses:
            start += ", on each of which both sides have the same score"
        if self.result.detects_nothing:
            nothing = f"no difference below {self.result.detectable:.2f}{unit}"
            return f"{start}: {nothing} is detectable with 80 % power"
        detectable = f"a difference of {self.result.detectable:.2f}{unit}"
        line = f"{start}: {detectable} is detectable with 80 % power"
        size = abs(self.result.difference)
        times = (self.result.detectable / size) ** 2 if size else 0.0
        if not 1 < times < 100:
            return line
        # neither alone: runs vary, too
        more = "the items and runs" if max(self.runs) > 1 else "the items"
        return f"{line}; detecting {size:.2f} needs {times:.1f} times {more}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, the headline numbers of every side, and the settings."""

    names: tuple[str, ...]  # sides, base first
    rows: tuple[Row, ...]
    # benchmark -> side -> headline number over all of the side's own questions
    scores: dict[str, dict[str, float]]
    titles: dict[str, str]
    units: dict[str, str]
    references: dict[str, dict[str, float]]  # model -> benchmark -> published number
    settings: dict[str, Any]
    notes: tuple[str, ...]
    # what makes numbers meaningless; before everything else in every report
    warnings: tuple[str, ...] = ()
    # benchmark -> side -> letters, best side first: two sides share one if and only if no verdict
    # tells them apart; with every two sides compared
    groups: dict[str, dict[str, str]] = field(default_factory=dict)

    def pairs(self) -> list[tuple[str, str, list[Row]]]:
        """(new, base, rows) of every two sides that are compared."""
        pairs: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            pairs.setdefault((row.new, row.base), []).append(row)
        return [(new, base, rows) for (new, base), rows in pairs.items()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the verdicts and power lines."""
        plain = asdict(self)
        for row, body in zip(self.rows, plain["rows"], strict=True):
            result = body.pop("result")
            del result["estimate"]
            body["base_score"] = result.pop("base")
            body["new_score"] = result.pop("new")
            body.update(result)
            body["interval"] = [row.result.low, row.result.high]
            body["interval_holm"] = list(row.interval)
            body["verdict"] = row.verdict
            body["power"] = row.power_line()
            body["parts"] = [part.to_dict() for part in row.parts]
        return plain


def build(
    sides: Sequence[Side],
    *,
    level: float = 0.95,
    references: bool = True,
    all_pairs: bool = False,
    min_overlap: float = MIN_OVERLAP,
    pair_runs: bool = False,
    blind: BlindLogs | None = None,
) -> Comparison:
    """Compare every side with the first, or every two; Holm's p-values are over all rows. With
    ``blind``, each difference is also split by which questions need eyes; Holm's p-values of these
    parts are over all parts. With ``pair_runs``, runs (seeds) of equal number go together.

    What cannot be compared, such as scores that are from 0 to 1 on one side and from 0 to 100 on
    another, is a note; ContractError or ValueError if nothing is left.
    """
    if blind:
        together = with_common_task([*sides, *blind.logs])
        blind = replace(blind, logs=tuple(together[len(sides) :]))
        sides = together[: len(sides)]
    sides = with_common_task(sides)
    other_scales, refused = check_scales(sides)
    sides = in_one_unit(sides)
    notes = [note for side in sides for note in side.notes]
    if blind:
        notes += [note for log in blind.logs for note in log.notes]
    pairs = [(sides[0], new) for new in sides[1:]]
    if all_pairs:
        pairs = list(combinations(sides, 2))
    tasks, problems, task_notes = tasks_of(pairs, refused)
    notes += task_notes
    rows, failed = compare_tasks(
        tasks, level=level, min_overlap=min_overlap, pair_runs=pair_runs, blind=blind
    )
    problems += failed.values()
    if not rows:
        raise problems[0]
    notes += [f"not compared: {problem}" for problem in problems]
    if pair_runs and all(row.runs == (1, 1) for row in rows):
        notes.append(NOTHING_PAIRED)
    rows = adjusted_rows(rows)
    scores = headline_numbers(sides)
    groups: dict[str, dict[str, str]] = {}
    if all_pairs and len(sides) > 2:
        notes += missing_pair_notes(rows, failed)
        incomplete = {name for _, _, name in failed}
        complete_rows = [row for row in rows if row.benchmark not in incomplete]
        groups = groups_of(complete_rows, scores)
    first_runs = {}
    for name, of_sides in scores.items():
        first = next(side for side in sides if side.name in of_sides)
        first_runs[name] = first.runs[name][0]
    published = {}
    if references and any(is_of_llava(side) for side in sides):
        published = published_numbers({row.benchmark for row in rows})
    return Comparison(
        names=tuple(side.name for side in sides),
        rows=tuple(rows),
        scores=scores,
        titles={name: run.title for name, run in first_runs.items()},
        units={name: run.unit for name, run in first_runs.items()},
        references=published,
        settings={"level": level, "pair_runs": pair_runs},
        notes=tuple(dict.fromkeys(notes)),
        warnings=(*warnings(sides), *other_scales),
        groups=groups,
    )


def tasks_of(
    pairs: Sequence[tuple[Side, Side]], refused: Mapping[str, str]
) -> tuple[list[Task], list[ValueError], list[str]]:
    """What to compare, without the refused benchmarks (benchmark -> reason); why something cannot
    be; and notes."""
    tasks: list[Task] = []
    problems: list[ValueError] = [ContractError(text) for text in refused.values()]
    notes = []
    for base, new in pairs:
        try:
            shared = benchmarks_in_common(base, new)
        except ValueError as error:
            problems.append(error)
            continue
        tasks += [(base, new, name) for name in shared if name not in refused]
        notes += one_sided_notes(base, new, names_pair=len(pairs) > 1)
        notes += copy_notes(base, new, shared)
    return tasks, problems, notes


def compare_tasks(
    tasks: Sequence[Task],
    *,
    level: float,
    min_overlap: float,
    pair_runs: bool,
    blind: BlindLogs | None,
) -> tuple[list[Row], dict[RowKey, ContractError]]:
    """A row for each task that can be compared, and why the others cannot."""
    rows: list[Row] = []
    failed: dict[RowKey, ContractError] = {}
    for task in tqdm(tasks, desc="comparing", unit="benchmark", delay=2):
        try:
            row = compare_benchmark(
                *task, level=level, min_overlap=min_overlap, pair_runs=pair_runs
            )
            if blind:
                row = with_parts(
                    row,
                    *task,
                    blind=blind,
                    min_overlap=min_overlap,
                    pair_runs=pair_runs,
                )
            rows.append(row)
        except ContractError as error:
            base, new, name = task
            failed[base.name, new.name, name] = error
    return rows, failed


def missing_pair_notes(
    rows: Sequence[Row], failed: Mapping[RowKey, ContractError]
) -> list[str]:
    """A note for each pair without which a benchmark has no letters: they would say that the two
    are not told apart."""
    compared = {row.benchmark for row in rows}
    notes = []
    for (base, new, name), reason in failed.items():
        if name in compared:
            notes.append(
                f"{name} has no letters, since {base} and {new} are not compared ({reason})"
            )
    return notes


def headline_numbers(sides: Sequence[Side]) -> dict[str, dict[str, float]]:
    """Benchmark -> side -> its headline number, mean over runs."""
    numbers: dict[str, dict[str, float]] = {}
    for name in ordered(name for side in sides for name in side.runs):
        numbers[name] = {}
        for side in sides:
            if name in side.runs:
                numbers[name][side.name] = mean_headline(side.runs[name])
    return numbers


def groups_of(
    rows: Sequence[Row], scores: dict[str, dict[str, float]]
) -> dict[str, dict[str, str]]:
    """The letters of every benchmark's sides, of which every two are compared. Verdicts are
    corrected over all rows, so letters are, too: the probability that any two sides that are
    equally good have no letter in common, on any benchmark, is at most 1 - level."""
    compared: dict[str, list[Row]] = {}
    for row in rows:
        compared.setdefault(row.benchmark, []).append(row)
    groups = {}
    for name, of_benchmark in compared.items():
        best_first = sorted(scores[name], key=lambda side: -scores[name][side])
        told_apart = []
        for row in of_benchmark:
            if row.verdict != "no difference shown":
                told_apart.append((row.base, row.new))
        groups[name] = letters(best_first, told_apart)
    return groups


def adjusted_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's p-values, and the intervals that go with them; so, too, their parts."""
    values = [row.result.p for row in rows]
    adjusted = []
    for row, p, factor in zip(rows, holm(values), holm_factors(values), strict=True):
        interval = row.result.interval(1 - (1 - row.level) / factor)
        adjusted.append(replace(row, p_holm=p, interval=interval))
    parts = adjusted_parts([part for row in rows for part in row.parts])
    with_adjusted_parts = []
    for row in adjusted:
        count = len(row.parts)
        with_adjusted_parts.append(replace(row, parts=tuple(parts[:count])))
        parts = parts[count:]
    return with_adjusted_parts


def with_parts(
    row: Row,
    base: Side,
    new: Side,
    name: str,
    *,
    blind: BlindLogs,
    min_overlap: float,
    pair_runs: bool,
) -> Row:
    """The row with its difference split by which questions need eyes; or with a note that says why
    it is not."""
    base_runs, new_runs, _ = paired_runs(name, base, new, min_overlap=min_overlap)
    if pair_runs:
        base_runs, new_runs, _ = matched_by_number(
            name, (base, base_runs), (new, new_runs)
        )
    try:
        parts, notes = split(
            name,
            (base, base_runs),
            (new, new_runs),
            blind,
            level=row.level,
            min_overlap=min_overlap,
            pair_runs=pair_runs,
        )
    except ContractError as error:
        # a note's line begins with the benchmark
        problem = str(error).removeprefix(f"{name}: ")
        return replace(row, notes=(*row.notes, f"not split: {problem}"))
    return replace(row, parts=tuple(parts), notes=(*row.notes, *notes))


def mean_headline(runs: Sequence[Run]) -> float:
    """The headline number, mean over runs."""
    return sum(run.statistic.full() for run in runs) / len(runs)


def is_of_llava(side: Side) -> bool:
    """Whether published numbers of LLaVA belong next to a side's: it is called so, or its answers
    were scored by the rules of LLaVA's evaluation. A served model is another, unless it is called
    so."""
    for runs in side.runs.values():
        for run in runs:
            if "llava" in f"{side.name} {run.model}".lower():
                return True
            settings = run.provenance.get("answer_settings") or {}
            if run.metrics and not settings.get("endpoint"):
                return True
    return False


def published_numbers(compared: Collection[str]) -> dict[str, dict[str, float]]:
    """model -> benchmark -> published number, of the benchmarks that are compared."""
    published: dict[str, dict[str, float]] = {}
    for name, rule in benchmarks().items():
        if name in compared:
            for model, value in rule.published.items():
                published.setdefault(model, {})[name] = value
    return published


def compare_benchmark(
    base: Side,
    new: Side,
    name: str,
    *,
    level: float,
    min_overlap: float = MIN_OVERLAP,
    pair_runs: bool = False,
) -> Row:
    """One benchmark: pair the questions, compare, count wins."""
    base_runs, new_runs, notes = paired_runs(name, base, new, min_overlap=min_overlap)
    if pair_runs:
        base_runs, new_runs, run_notes = matched_by_number(
            name, (base, base_runs), (new, new_runs)
        )
        notes += run_notes
    first = base_runs[0]
    base_statistics = [run.statistic for run in base_runs]
    new_statistics = [run.statistic for run in new_runs]
    paired = pair(base_statistics, new_statistics, first.clusters)
    span = largest_difference([*base_runs, *new_runs])
    result = compare(paired, level=level, span=span, pair_runs=pair_runs)
    counted_N = counted([*base_statistics, *new_statistics])
    base_N = mean_scores(base_runs)[counted_N]
    new_N = mean_scores(new_runs)[counted_N]
    images = len(set(compress(first.clusters, counted_N)))
    category_N = list(compress(first.groups, counted_N))
    notes += notes_of_runs(name, base, new)
    if images == 1 and len(base_N) > 1:
        notes.append(
            "all questions are about one image, so the interval is meaningless"
        )
    return Row(
        benchmark=name,
        title=first.title,
        unit=first.unit,
        base=base.name,
        new=new.name,
        result=result,
        p_holm=result.p,
        interval=(result.low, result.high),
        level=level,
        wins=int((new_N > base_N).sum()),
        losses=int((new_N < base_N).sum()),
        ties=int((new_N == base_N).sum()),
        questions=len(base_N),
        images=images,
        runs=(len(base_runs), len(new_runs)),
        categories=scores_by_category(category_N, base_N, new_N),
        notes=tuple(dict.fromkeys(notes)),
    )


def largest_difference(runs: Sequence[Run]) -> float:
    """The largest difference that there can be between two headline numbers."""
    unit = runs[0].unit
    if unit == "points":  # MME's: 100 of the questions, 100 of the pairs
        return 200.0 * len(set(runs[0].groups))
    if unit not in ("score", "CIDEr"):
        return 100.0
    if runs[0].aggregate in (PERPLEXITY, BITS):
        return 2 * max(abs(run.statistic.full()) for run in runs)
    scores = [0.0]
    for run in runs:
        scores += [run.scale * min(run.scores), run.scale * max(run.scores)]
    return (max(scores) - min(scores)) or 1.0


def mean_scores(runs: Sequence[Run]) -> np.ndarray:
    """(N,) each question's score, mean over runs."""
    return np.mean([run.scores for run in runs], axis=0)


def notes_of_runs(name: str, base: Side, new: Side) -> list[str]:
    """The notes of both sides' runs on a benchmark; those of one side after its name."""
    base_notes = [note for run in base.runs[name] for note in run.notes]
    new_notes = [note for run in new.runs[name] for note in run.notes]
    notes = [
        note if note in new_notes else f"{base.name}: {note}" for note in base_notes
    ]
    return notes + [
        note if note in base_notes else f"{new.name}: {note}" for note in new_notes
    ]


def scores_by_category(
    category_N: Sequence[str], base_N: np.ndarray, new_N: np.ndarray
) -> dict[str, tuple[float, float, int]]:
    """Mean score of base and of new, and number of questions, of each of G categories, the largest
    first; empty if there is only one."""
    names_G, index_N, count_G = np.unique(
        category_N, return_inverse=True, return_counts=True
    )
    if len(names_G) < 2:
        return {}
    base_G = np.bincount(index_N, base_N) / count_G
    new_G = np.bincount(index_N, new_N) / count_G
    by_category = {}
    for group in np.argsort(-count_G, kind="stable"):
        means = (float(base_G[group]), float(new_G[group]))
        by_category[str(names_G[group])] = (*means, int(count_G[group]))
    return by_category
