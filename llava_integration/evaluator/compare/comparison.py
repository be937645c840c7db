"""Sides of a comparison, read from score files and logs; runs paired by question id; statistics for
each benchmark."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, compress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_integration.evaluator.benchmarks.benchmark import (
    Benchmark,
    Item,
    Statistic,
    mean_of_parts,
    mean_statistic,
)
from llava_integration.evaluator.benchmarks.rules import benchmarks
from llava_integration.evaluator.benchmarks.rules.mme import paired_accuracy
from llava_integration.evaluator.compare.readers import (
    BY_PART,
    NO_CHOICES,
    Choices,
    Log,
    read_logs,
    readers,
)
from llava_integration.evaluator.compare.statistics import (
    Difference,
    compare,
    counted,
    holm,
    holm_factors,
    pair,
)
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_file

EMPTY = 0.1  # fraction of empty answers above which a score is not the model's
MIN_OVERLAP = 0.9  # fraction of questions that both sides must have


@dataclass(frozen=True, kw_only=True)
class Run(Log):
    """One model's scores on one benchmark. The lists have a place for each item, in any order."""

    ids: list[str]  # each once
    scores: list[float]  # higher is better
    clusters: list[str]  # questions of one cluster are resampled together: those about one image
    groups: list[str]  # category in the report
    rule: Benchmark | None  # whose headline number is the run's; None: that of ``aggregate``
    title: str  # in tables
    unit: str  # of the headline number; scores are from 0 to 1 for "%" and a mean score

    @property
    def statistic(self) -> Statistic:
        """The headline number as a function of sums over the questions."""
        if rule := self.rule or benchmarks().get(self.aggregate):
            return rule.statistic(self.items)
        if self.aggregate == "MME":
            return paired_accuracy(self.items, sorted(set(self.groups)))
        if self.aggregate == BY_PART:
            return mean_of_parts(self.groups, self.scores, self.scale)
        return mean_statistic(self.scores, scale=self.scale)

    @property
    def scale(self) -> float:
        """The number in its unit, of a mean score."""
        return 1.0 if self.unit in ("score", "points") else 100.0

    def pick(self, ids: Sequence[str]) -> "Run":
        """The run on these questions, in their order."""
        if ids == self.ids:
            return self
        position = {name: number for number, name in enumerate(self.ids)}
        chosen = [position[name] for name in ids]
        return replace(
            self,
            ids=[self.ids[i] for i in chosen],
            scores=[self.scores[i] for i in chosen],
            clusters=[self.clusters[i] for i in chosen],
            groups=[self.groups[i] for i in chosen],
            items=[self.items[i] for i in chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model: its name and the runs on each benchmark."""

    name: str
    path: Path
    runs: dict[str, tuple[Run, ...]]
    notes: tuple[str, ...] = ()


def load_side(
    path: Path, name: str = "", *, same_model: bool = False, choices: Choices = NO_CHOICES
) -> Side:
    """Read a score file or another evaluator's log, or all below a folder; several of one benchmark
    are its runs. Raises FileNotFoundError, or ContractError for what can't be read or compared,
    such as logs of several models, unless they are said to be runs of the ``same_model``."""
    runs, notes = load_runs(path, choices)
    side = side_of(path, runs, name or (path.name if path.is_dir() else ""), notes)
    if not same_model:
        for of_benchmark in side.runs.values():
            check_one_model(path, of_benchmark)
    return side


def load_models(path: Path, choices: Choices = NO_CHOICES) -> list[Side]:
    """A side for each model in a table or in the logs below a folder, in the order in which they
    appear."""
    runs, notes = load_runs(path, choices)
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(model_of(run), []).append(run)
    return [side_of(path, of_model, name, notes) for name, of_model in models.items()]


def side_of(path: Path, runs: Sequence[Run], name: str, notes: Sequence[str]) -> Side:
    """The side of these runs, by benchmark; without a ``name`` it has the model's or the file's."""
    by_benchmark: dict[str, tuple[Run, ...]] = {}
    for run in runs:
        by_benchmark[run.benchmark] = (*by_benchmark.get(run.benchmark, ()), run)
    return Side(
        name=name or runs[0].model or path.stem, path=path, runs=by_benchmark, notes=tuple(notes)
    )


def load_runs(path: Path, choices: Choices) -> tuple[list[Run], list[str]]:
    """All runs in a file or below a folder, and notes on what is left out. Raises
    FileNotFoundError, or ContractError if nothing can be compared."""
    if not path.exists():
        raise FileNotFoundError(f"no score file, log or folder {path}")
    records = read_logs(path, choices)
    if not records:
        known = f"known: {', '.join(readers())}; a table needs the columns item and score"
        raise FileNotFoundError(
            f"{path} has no score files (`llm2clip score` writes them) and no logs; {known}"
        )
    runs = []
    notes = []
    copies = copied_logs(records)
    for file, record in records:
        if record.unknown:
            notes.append(f"left out: {record.unknown}")
            continue
        if file in copies.get(record.benchmark, {}):
            original = copies[record.benchmark][file]
            notes.append(
                f"{file} is a copy of {original}: not counted as another run of {record.benchmark}"
            )
            continue
        try:
            runs.append(run_of(file, record))
        except ContractError as error:
            if len(records) == 1:
                raise
            notes.append(f"left out: {error}")
    if not runs:
        raise ContractError("; ".join(notes))
    return runs, notes


def copied_logs(records: Iterable[tuple[Path, Log]]) -> dict[str, dict[Path, Path]]:
    """Benchmark -> each log that is another by another path, or has the same bytes -> the first of
    them. Logs with the same scores are no copies."""
    digest_of: dict[Path, str] = {}
    first_of: dict[tuple[str, ...], Path] = {}
    copies: dict[str, dict[Path, Path]] = {}
    for path, record in records:
        for file in record.files:
            if file not in digest_of:
                digest_of[file] = sha256_file(file)
        key = (record.benchmark, *(digest_of[file] for file in record.files))
        first = first_of.setdefault(key, path)
        if first != path:
            copies.setdefault(record.benchmark, {})[path] = first
    return copies


# what tells runs of one model apart in its name
SEED = re.compile(r"(seed|run)[-_ =]*\d+", re.IGNORECASE)


def model_of(run: Run) -> str:
    """The run's model, without the number of a seed."""
    return SEED.sub(r"\1", run.model)


def check_one_model(path: Path, runs: Sequence[Run]) -> None:
    """Raises ContractError if the logs of a benchmark are of several models: they are no runs."""
    models = sorted({model_of(run) for run in runs if run.model})
    if len(models) > 1:
        raise ContractError(
            f"{path} has logs of {len(models)} models ({', '.join(models)}) on "
            f"{runs[0].benchmark}; pass the files or folders of each model as a side of its own, "
            "or --same-model if they are runs (seeds) of one"
        )


# headline number of a log whose benchmark has no rule -> its unit
UNIT_OF_AGGREGATE = {"MME": "points", "CIDEr": "CIDEr", "pope": "F1"}


def is_scored(item: Item) -> bool:
    return isinstance(item.get("id"), (str, int)) and "score" in item


def check_items(path: Path, items: Sequence[Item]) -> None:
    """Raises ContractError if items can't be compared."""
    if not items or not all(is_scored(item) for item in items):
        raise ContractError(
            f"{path}: a comparison needs one item per question, each with an id and a score"
        )
    for item in items:
        for key, value in item.items():
            fits = isinstance(value, (int, float)) and abs(value) <= 1e12
            if not fits and (key == "score" or isinstance(value, float)):
                raise ContractError(
                    f"{path}: {key} of item {item['id']!r} is {value!r}, expected a finite number"
                )
    (most_common, times), *_ = Counter(str(item["id"]) for item in items).most_common(1)
    if times > 1:
        raise ContractError(f"{path} has item {most_common} twice; score the answers again")


def missing_fields(rule: Benchmark, items: Sequence[Item]) -> list[str]:
    """The fields that a rule's headline number needs and that some item lacks."""
    missing = []
    for name in rule.item_fields:
        if any(name not in item for item in items):
            missing.append(name)
    return missing


def run_of(path: Path, record: Log) -> Run:
    """A score file's run, with the headline number of the benchmark's rule unless the items lack
    what that needs. Raises ContractError if the items can't be compared."""
    items = record.items
    check_items(path, items)
    benchmark = benchmarks().get(record.benchmark)
    rule = benchmark
    notes = record.notes
    if benchmark and (missing := missing_fields(benchmark, items)):
        rule = None
        lacking = f"items have no {', '.join(missing)}"
        notes = [f"{lacking}; mean score instead of {benchmark.headline}", *notes]
    scores = [float(item["score"]) for item in items]
    unit = rule.unit if rule else UNIT_OF_AGGREGATE.get(record.aggregate, "")
    if not unit:
        unit = "%" if all(0 <= score <= 1 for score in scores) else "score"
    run = Run(
        **{**vars(record), "notes": notes},
        ids=[str(item["id"]) for item in items],
        scores=scores,
        clusters=[str(item.get("cluster", item["id"])) for item in items],
        groups=[str(item.get("category") or "") for item in items],
        rule=rule,
        title=benchmark.title if benchmark else record.benchmark,
        unit=unit,
    )
    number = run.statistic.full()
    printed = record.printed
    if printed is None or is_printed(number, printed, run):
        return run
    differs = (
        f"its evaluator printed {printed:.4g}, made of the scores in another way; "
        f"here {number / run.scale:.4g}"
    )
    return replace(run, notes=[*notes, differs])


def is_printed(number: float, printed: float, run: Run) -> bool:
    """Whether a headline number is the one that was printed, as a share or in percent."""
    shown = [printed * run.scale]
    if run.unit == "%":
        shown.append(printed)
    return any(math.isclose(number, one, rel_tol=1e-3, abs_tol=0.01) for one in shown)


def load_sides(
    paths: Sequence[Path],
    names: Sequence[str],
    *,
    same_model: bool = False,
    choices: Choices = NO_CHOICES,
) -> list[Side]:
    """Read all sides; equal names get the parent folder's name or a number."""
    if names and len(names) != len(paths):
        raise ValueError(
            f"{len(names)} --names for {len(paths)} sides; pass one name per side, base first"
        )
    if not names:
        names = [""] * len(paths)
    sides = [
        load_side(path, name, same_model=same_model, choices=choices)
        for path, name in zip(paths, names, strict=True)
    ]
    sides = rename_equal(
        sides, [f"{side.path.resolve().parent.name}/{side.path.stem}" for side in sides]
    )
    sides = rename_equal(sides, [f"{side.name} #{number}" for number, side in enumerate(sides)])
    return with_common_task(sides)


UNNAMED = "scores"  # the task of tables that name none


def with_common_task(sides: Sequence[Side]) -> list[Side]:
    """The sides, of which those with a single table that names no task get the task of the others,
    or UNNAMED: two tables of a few columns are of the same items."""
    if any(len(side.runs) != 1 for side in sides):
        return list(sides)
    named = set()
    for side in sides:
        for name, runs in side.runs.items():
            if runs[0].named:
                named.add(name)
    all_names = {name for side in sides for name in side.runs}
    if len(all_names) == 1 or len(named) > 1:
        return list(sides)
    task = named.pop() if named else UNNAMED
    renamed = []
    for side in sides:
        (runs,) = side.runs.values()
        runs = tuple(replace(run, benchmark=task, title=task) for run in runs)
        renamed.append(replace(side, runs={task: runs}))
    return renamed


def rename_equal(sides: Sequence[Side], names: Sequence[str]) -> list[Side]:
    """The sides, those that share their name with another under a new one."""
    count = Counter(side.name for side in sides)
    return [
        replace(side, name=name) if count[side.name] > 1 else side
        for side, name in zip(sides, names, strict=True)
    ]


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

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'no difference shown', with 1 - level over all rows."""
        if self.p_holm >= 1 - self.level:
            return "no difference shown"
        return "better" if self.result.difference > 0 else "worse"

    def power_line(self) -> str:
        """The difference that this many questions, and runs, can detect."""
        unit = "points" if self.unit == "%" else self.unit
        start = f"{self.questions} items"
        if self.images != self.questions:
            start += f" in {self.images} clusters"
        if not self.wins and not self.losses:
            start += ", on each of which both sides have the same score"
        detectable = f"a difference of {self.result.detectable:.2f} {unit}"
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
            body |= {"base_score": result.pop("base"), "new_score": result.pop("new"), **result}
            body |= {
                "interval": [row.result.low, row.result.high],
                "interval_holm": list(row.interval),
                "verdict": row.verdict,
                "power": row.power_line(),
            }
        return plain


def build(
    sides: Sequence[Side],
    *,
    level: float = 0.95,
    references: bool = True,
    all_pairs: bool = False,
    min_overlap: float = MIN_OVERLAP,
) -> Comparison:
    """Compare every side with the first, or every two; Holm's p-values are over all rows. Raises
    ContractError for scores that are from 0 to 1 on one side and from 0 to 100 on another."""
    sides = with_common_task(sides)
    other_scales = check_scales(sides)
    sides = in_one_unit(sides)
    notes = [note for side in sides for note in side.notes]
    pairs = combinations(sides, 2) if all_pairs else [(sides[0], new) for new in sides[1:]]
    tasks = []
    for base, new in pairs:
        tasks += [(base, new, name) for name in benchmarks_in_common(base, new)]
        for name in ordered(set(base.runs) ^ set(new.runs)):
            only = base.name if name in base.runs else new.name
            notes.append(f"{name} is not compared: only {only} has its scores")
    bar = tqdm(tasks, desc="comparing", unit="benchmark", delay=2)
    rows: list[Row] = []
    problems = []
    for task in bar:
        try:
            rows.append(compare_benchmark(*task, level=level, min_overlap=min_overlap))
        except ContractError as error:
            problems.append(error)
    if not rows:
        raise problems[0]
    notes += [f"not compared: {problem}" for problem in problems]
    rows = adjusted_rows(rows)
    titles = {}
    units = {}
    scores = {}
    for name in ordered(name for side in sides for name in side.runs):
        runs = {side.name: side.runs[name] for side in sides if name in side.runs}
        scores[name] = {side: mean_headline(runs_of_side) for side, runs_of_side in runs.items()}
        first, *_ = next(iter(runs.values()))
        titles[name] = first.title
        units[name] = first.unit
    published = {}
    if references and any(is_of_llava(side) for side in sides):
        published = published_numbers({row.benchmark for row in rows})
    return Comparison(
        names=tuple(side.name for side in sides),
        rows=tuple(rows),
        scores=scores,
        titles=titles,
        units=units,
        references=published,
        settings={"level": level},
        notes=tuple(dict.fromkeys(notes)),
        warnings=(*warnings(sides), *other_scales),
    )


def adjusted_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's p-values, and the intervals that go with them."""
    values = [row.result.p for row in rows]
    adjusted = []
    for row, p, factor in zip(rows, holm(values), holm_factors(values), strict=True):
        interval = row.result.interval(1 - (1 - row.level) / factor)
        adjusted.append(replace(row, p_holm=p, interval=interval))
    return adjusted


def benchmarks_in_common(base: Side, new: Side) -> list[str]:
    """The benchmarks that both sides have, in the order of tables; ValueError if there is none."""
    shared = ordered(set(base.runs) & set(new.runs))
    if not shared:
        known = (f"{side.name} ({', '.join(ordered(side.runs))})" for side in (base, new))
        raise ValueError(f"{' and '.join(known)} have no benchmark in common")
    return shared


def mean_headline(runs: Sequence[Run]) -> float:
    """The headline number, mean over runs."""
    return sum(run.statistic.full() for run in runs) / len(runs)


def is_of_llava(side: Side) -> bool:
    """Whether published numbers of LLaVA belong next to a side's: it is called so, or was scored by
    the rules of LLaVA's evaluation."""
    for runs in side.runs.values():
        for run in runs:
            if run.metrics or "llava" in f"{side.name} {run.model}".lower():
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


def in_one_unit(sides: Sequence[Side]) -> list[Side]:
    """Sides whose scores of a benchmark are all percentages, or none, if scores of one run are
    above 1."""
    all_runs = [run for side in sides for runs in side.runs.values() for run in runs]
    plain = {run.benchmark for run in all_runs if run.unit == "score"}
    converted = []
    for side in sides:
        runs_of = dict(side.runs)
        for name, runs in side.runs.items():
            if name in plain:
                runs_of[name] = tuple(replace(run, unit="score") for run in runs)
        converted.append(replace(side, runs=runs_of))
    return converted


PERCENT = 50.0  # scores of a side that reach this are percentages, if those of another are shares


def check_scales(sides: Sequence[Side]) -> list[str]:
    """Warnings about benchmarks whose scores are at most 1 on one side and above on another;
    ContractError if they are clearly shares and percentages."""
    found = []
    for name in ordered(name for side in sides for name in side.runs):
        largest = {}
        for side in sides:
            runs = side.runs.get(name, ())
            scores = [abs(score) for run in runs if run.rule is None for score in run.scores]
            if scores:
                largest[side.name] = max(scores)
        shares = [side for side, most in largest.items() if 0 < most <= 1]
        others = [side for side, most in largest.items() if most >= 2]
        if not shares or not others:
            continue
        scales = (
            f"scores on {name} are at most {max(largest[side] for side in shares):g} in "
            f"{', '.join(shares)} and go to {max(largest[side] for side in others):g} in "
            f"{', '.join(others)}"
        )
        if max(largest[side] for side in others) >= PERCENT:
            raise ContractError(f"{scales}; write both from 0 to 1, or both from 0 to 100")
        found.append(f"{scales}: if these are two scales, the difference means nothing")
    return found


# how a side answered; another value may move the scores by itself
ANSWER_SETTINGS = (
    "precision",
    "dtype",
    "load_8bit",
    "load_4bit",
    "conv_mode",
    "temperature",
    "num_beams",
)


def recorded_settings(side: Side) -> list[dict[str, Any]]:
    """The provenance of each of a side's runs, and the settings of its answers."""
    recorded = []
    for runs in side.runs.values():
        for run in runs:
            recorded.append(run.provenance)
            answer_settings = run.provenance.get("answer_settings")
            if isinstance(answer_settings, dict):
                recorded.append(answer_settings)
    return recorded


def warnings(sides: Sequence[Side]) -> Iterator[str]:
    """Empty answers that are more than EMPTY of a side's, and sides that answered in different
    precisions or ways."""
    for side in sides:
        for runs in side.runs.values():
            empty = sum(run.counts.get("empty", 0) for run in runs)
            total = sum(run.counts.get("answered", 0) for run in runs)
            if empty > EMPTY * total:
                yield f"{empty} of the {total} answers of {side.name} to {runs[0].title} are empty"
    recorded = {side.name: recorded_settings(side) for side in sides}
    for setting in ANSWER_SETTINGS:
        used: dict[str, str] = {}
        for name, records in recorded.items():
            values = {str(record[setting]) for record in records if setting in record}
            used[name] = "/".join(sorted(values))
        if len({*used.values()} - {""}) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in used.items() if value)
            yield f"the sides differ in their {setting}, which alone may move scores: {listed}"


def compare_benchmark(
    base: Side, new: Side, name: str, *, level: float, min_overlap: float = MIN_OVERLAP
) -> Row:
    """One benchmark: pair the questions, compare, count wins."""
    base_runs, new_runs, notes = paired_runs(name, base, new, min_overlap=min_overlap)
    first = base_runs[0]
    base_statistics = [run.statistic for run in base_runs]
    new_statistics = [run.statistic for run in new_runs]
    paired = pair(base_statistics, new_statistics, first.clusters)
    span = largest_difference([*base_runs, *new_runs])
    result = compare(paired, level=level, span=span)
    counted_N = counted([*base_statistics, *new_statistics])
    base_N = mean_scores(base_runs)[counted_N]
    new_N = mean_scores(new_runs)[counted_N]
    images = len(set(compress(first.clusters, counted_N)))
    notes += notes_of_runs(name, base, new)
    if images == 1 and len(base_N) > 1:
        notes.append("all questions are about one image, so the interval is meaningless")
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
        categories=scores_by_category(list(compress(first.groups, counted_N)), base_N, new_N),
        notes=tuple(dict.fromkeys(notes)),
    )


def largest_difference(runs: Sequence[Run]) -> float:
    """The largest difference that there can be between two headline numbers."""
    unit = runs[0].unit
    if unit == "points":  # MME's: 100 of the questions, 100 of the pairs
        return 200.0 * len(set(runs[0].groups))
    if unit not in ("score", "CIDEr"):
        return 100.0
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
    notes = [note if note in new_notes else f"{base.name}: {note}" for note in base_notes]
    return notes + [note if note in base_notes else f"{new.name}: {note}" for note in new_notes]


def scores_by_category(
    category_N: Sequence[str], base_N: np.ndarray, new_N: np.ndarray
) -> dict[str, tuple[float, float, int]]:
    """Mean score of base and of new, and number of questions, of each of G categories, the largest
    first; empty if there is only one."""
    names_G, index_N, count_G = np.unique(category_N, return_inverse=True, return_counts=True)
    if len(names_G) < 2:
        return {}
    base_G = np.bincount(index_N, base_N) / count_G
    new_G = np.bincount(index_N, new_N) / count_G
    return {
        str(names_G[i]): (float(base_G[i]), float(new_G[i]), int(count_G[i]))
        for i in np.argsort(-count_G, kind="stable")
    }


def paired_runs(
    name: str, base: Side, new: Side, *, min_overlap: float = MIN_OVERLAP
) -> tuple[list[Run], list[Run], list[str]]:
    """Both sides' runs on the questions that all have, in one order, and notes; ContractError for
    another truth, or if less than ``min_overlap`` of the questions are in common."""
    runs = [*base.runs[name], *new.runs[name]]
    shared = set.intersection(*(set(run.ids) for run in runs))
    largest = max(len(run.ids) for run in runs)
    if not shared or len(shared) < min_overlap * largest:
        counts = f"{len(shared)} questions of {', '.join(str(len(run.ids)) for run in runs)}"
        raise ContractError(
            f"{name}: {base.name} and {new.name} share {counts}; "
            "evaluate both on the same questions, or lower --min-overlap"
        )
    shared_ids = [identifier for identifier in runs[0].ids if identifier in shared]
    runs = [run.pick(shared_ids) for run in runs]
    for run in runs[1:]:
        for identifier, item, other in zip(run.ids, runs[0].items, run.items, strict=True):
            truth = item.get("truth")
            if truth != other.get("truth"):
                both = f"{truth!r} in {base.name}, {other.get('truth')!r} in {run.model}"
                raise ContractError(
                    f"{name}: the truth of question {identifier} is {both}; "
                    "score both by the same annotations"
                )
    runs, notes = in_joint_clusters(runs)
    if len(shared) < largest:
        notes.append(f"{largest - len(shared)} questions are not in every file; ignored")
    if len({run.provenance.get("data_sha256", "") for run in runs} - {""}) > 1:
        notes.append(
            "the sides were scored with different annotation files; truths in common are equal"
        )
    count = len(base.runs[name])
    return runs[:count], runs[count:], notes


def in_joint_clusters(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with one grouping, and notes: questions that go together in any of them go together
    in all, whichever is the base."""
    if all(run.clusters == runs[0].clusters for run in runs):
        return list(runs), []
    parents = list(range(len(runs[0].ids)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    for run in runs:
        first_of: dict[str, int] = {}
        for place, cluster in enumerate(run.clusters):
            first = first_of.setdefault(cluster, place)
            parents[root(place)] = root(first)
    clusters = [runs[0].ids[root(place)] for place in range(len(parents))]
    joined = len(set(clusters))
    coarsest = min(len(set(run.clusters)) for run in runs)
    finest = max(len(set(run.clusters)) for run in runs)
    notes = []
    if finest > joined:
        notes.append(
            "not every log tells which items go together; the grouping of those that do is used"
            if joined == coarsest
            else "the logs group the items in different ways; what one of them joins is joined"
        )
    return [replace(run, clusters=clusters) for run in runs], notes


def ordered(names: Iterable[str]) -> list[str]:
    """Benchmarks in the order of tables, unknown ones last, by name."""
    position = {name: number for number, name in enumerate(benchmarks())}
    return sorted(set(names), key=lambda name: (position.get(name, len(position)), name))
