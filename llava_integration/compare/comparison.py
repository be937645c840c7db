"""Sides of a comparison, read from score files and logs; runs paired by question id; statistics for
each benchmark."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_integration.benchmarks.benchmark import (
    Benchmark,
    Statistic,
    mean_of_parts,
    mean_statistic,
)
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.benchmarks.rules.mme import paired_accuracy
from llava_integration.compare.readers import BY_PART, Log, read_logs, readers
from llava_integration.compare.statistics import Difference, compare, counted, holm, pair
from llm2clip_plugin.files import ContractError

EMPTY = 0.1  # fraction of empty answers above which a score is not the model's
FEWEST_IN_COMMON = 0.9  # fraction of questions that both sides must have


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
        place = {name: number for number, name in enumerate(self.ids)}
        chosen = [place[one] for one in ids]
        names = ("ids", "scores", "clusters", "groups", "items")
        return replace(
            self, **{name: [getattr(self, name)[one] for one in chosen] for name in names}
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model: its name and the runs on each benchmark."""

    name: str
    path: Path
    runs: dict[str, tuple[Run, ...]]
    notes: tuple[str, ...] = ()


def load_side(path: Path, name: str = "") -> Side:
    """Read a score file or another evaluator's log, or all below a folder; several of one benchmark
    are its runs. Raises FileNotFoundError, or ContractError for what can't be read or compared."""
    if not path.exists():
        raise FileNotFoundError(f"no score file, log or folder {path}")
    records = read_logs(path)
    if not records:
        known = f"known: {', '.join(readers())}; a table needs the columns item and score"
        raise FileNotFoundError(
            f"{path} has no score files (`llm2clip score` writes them) and no logs; {known}"
        )
    runs: dict[str, tuple[Run, ...]] = {}
    notes = []
    for file, record in records:
        if record.unknown:
            notes.append(f"left out: {record.unknown}")
            continue
        run = run_of(file, record)
        earlier = runs.get(run.benchmark, ())
        if any(run.items == other.items for other in earlier):
            notes.append(
                f"{file} duplicates another file of {run.benchmark}: not counted as another run"
            )
        else:
            runs[run.benchmark] = (*earlier, run)
    if not runs:
        raise ContractError("; ".join(notes))
    default = path.name if path.is_dir() else records[0][1].model or path.stem
    return Side(name=name or default, path=path, runs=runs, notes=tuple(notes))


def run_of(path: Path, record: Log) -> Run:
    """A score file's run, with the headline number of the benchmark's rule unless the items lack
    what that needs. Raises ContractError if the items can't be compared."""
    items = record.items
    ids = [str(item.get("id")) for item in record.items]
    if not items or any(
        not isinstance(item.get("id"), (str, int)) or "score" not in item for item in items
    ):
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
    if len(set(ids)) < len(ids):
        raise ContractError(
            f"{path} has item {Counter(ids).most_common(1)[0][0]} twice; score the answers again"
        )
    rule = benchmarks().get(record.benchmark)
    notes = record.notes
    own = rule
    if rule and (
        lacking := [name for name in rule.item_fields if any(name not in item for item in items)]
    ):
        own = None
        notes = [
            f"items have no {', '.join(lacking)}; mean score instead of {rule.headline}",
            *notes,
        ]
    scores = [float(item["score"]) for item in items]
    unit = (
        own.unit
        if own
        else {"MME": "points", "CIDEr": "CIDEr", "pope": "F1"}.get(record.aggregate, "")
    )
    run = Run(
        **{**vars(record), "notes": notes},
        ids=ids,
        scores=scores,
        clusters=[str(item.get("cluster", item["id"])) for item in items],
        groups=[str(item.get("category") or "") for item in items],
        rule=own,
        title=rule.title if rule else record.benchmark,
        unit=unit or ("%" if all(0 <= score <= 1 for score in scores) else "score"),
    )
    number = run.statistic.full()
    printed = record.printed
    if printed is None or math.isclose(number, printed * run.scale, rel_tol=1e-3, abs_tol=0.01):
        return run
    said = f"its evaluator printed {printed:.4g}, made of the scores in another way; here {number / run.scale:.4g}"
    return replace(run, notes=[*notes, said])


def load_sides(paths: Sequence[Path], names: Sequence[str]) -> list[Side]:
    """Read all sides; equal names get the parent folder's name or a number."""
    if names and len(names) != len(paths):
        raise ValueError(
            f"{len(names)} --names for {len(paths)} sides; pass one name per side, base first"
        )
    sides = [load_side(path, names[place] if names else "") for place, path in enumerate(paths)]
    for rename in (
        lambda place, side: f"{side.path.resolve().parent.name}/{side.path.stem}",
        lambda place, side: f"{side.name} #{place}",
    ):
        shown = Counter(side.name for side in sides)
        names = [
            rename(*item) if shown[item[1].name] > 1 else item[1].name for item in enumerate(sides)
        ]
        sides = [replace(side, name=name) for side, name in zip(sides, names, strict=True)]
    return sides


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
        """'better', 'worse' or 'no difference shown', at 5 % over all rows."""
        if self.p_holm >= 0.05:
            return "no difference shown"
        return "better" if self.result.difference > 0 else "worse"

    def power_line(self) -> str:
        """The difference that this many questions, and runs, can detect."""
        unit = "points" if self.unit == "%" else self.unit
        start = f"{self.questions} questions"
        if self.images != self.questions:
            start += f" in {self.images} clusters (of one image or text each)"
        if not self.result.detectable:
            return f"{start}; both sides have the same score on each"
        line = f"{start}: a difference of {self.result.detectable:.2f} {unit} is detectable with 80 % power"
        size = abs(self.result.difference)
        times = (self.result.detectable / size) ** 2 if size else 0.0
        # neither alone: runs vary, too
        more = "the questions and runs" if max(self.runs) > 1 else "the questions"
        return (
            f"{line}; detecting {size:.2f} needs {times:.1f} times {more}"
            if 1 < times < 100
            else line
        )


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
        pairs = dict.fromkeys((row.new, row.base) for row in self.rows)
        return [
            (new, base, [row for row in self.rows if (row.new, row.base) == (new, base)])
            for new, base in pairs
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the verdicts and power lines."""
        plain = asdict(self)
        for row, body in zip(self.rows, plain["rows"], strict=True):
            result = body.pop("result")
            body |= {"base_score": result.pop("base"), "new_score": result.pop("new"), **result}
            body |= {
                "interval": [row.result.low, row.result.high],
                "verdict": row.verdict,
                "power": row.power_line(),
            }
        return plain


def build(
    sides: Sequence[Side],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    references: bool = True,
    all_pairs: bool = False,
) -> Comparison:
    """Compare every side with the first, or every two; Holm's p-values are over all rows."""
    sides = in_one_unit(sides)
    notes = [note for side in sides for note in side.notes]
    tasks = []
    for base, new in (
        combinations(sides, 2) if all_pairs else [(sides[0], new) for new in sides[1:]]
    ):
        shared = ordered(set(base.runs) & set(new.runs))
        if not shared:
            known = (f"{side.name} ({', '.join(ordered(side.runs))})" for side in (base, new))
            raise ValueError(f"{' and '.join(known)} have no benchmark in common")
        tasks += [(base, new, name) for name in shared]
        for name in ordered(set(base.runs) ^ set(new.runs)):
            notes.append(
                f"{name} is not compared: only {base.name if name in base.runs else new.name} has its scores"
            )
    bar = tqdm(tasks, desc="comparing", unit="benchmark", delay=2)
    rows = [compare_benchmark(*task, resamples=resamples, level=level, seed=seed) for task in bar]
    rows = [
        replace(row, p_holm=p)
        for row, p in zip(rows, holm([row.result.p for row in rows]), strict=True)
    ]
    titles = {}
    units = {}
    scores = {}
    for name in ordered(name for side in sides for name in side.runs):
        runs = {side.name: side.runs[name] for side in sides if name in side.runs}
        scores[name] = {
            side: sum(run.statistic.full() for run in of) / len(of) for side, of in runs.items()
        }
        first, *_ = next(iter(runs.values()))
        titles[name] = first.title
        units[name] = first.unit
    published: dict[str, dict[str, float]] = {}
    for name, rule in benchmarks().items():
        if references and any(row.benchmark == name for row in rows):
            for model, value in rule.published.items():
                published.setdefault(model, {})[name] = value
    return Comparison(
        names=tuple(side.name for side in sides),
        rows=tuple(rows),
        scores=scores,
        titles=titles,
        units=units,
        references=published,
        settings={"resamples": resamples, "level": level, "seed": seed},
        notes=tuple(dict.fromkeys(notes)),
        warnings=tuple(warnings(sides)),
    )


def in_one_unit(sides: Sequence[Side]) -> list[Side]:
    """Sides whose scores of a benchmark are all percentages, or none, if scores of one run are
    above 1."""
    plain = {
        run.benchmark
        for side in sides
        for runs in side.runs.values()
        for run in runs
        if run.unit == "score"
    }

    def shown(runs: tuple[Run, ...]) -> tuple[Run, ...]:
        return tuple(replace(run, unit="score") if run.benchmark in plain else run for run in runs)

    return [
        replace(side, runs={name: shown(runs) for name, runs in side.runs.items()})
        for side in sides
    ]


def warnings(sides: Sequence[Side]) -> Iterator[str]:
    """Empty answers that are more than EMPTY of a side's, and sides that answered in different
    precisions or ways."""
    for side in sides:
        for runs in side.runs.values():
            empty, total = (
                sum(run.counts.get(kind, 0) for run in runs) for kind in ("empty", "answered")
            )
            if empty > EMPTY * total:
                yield f"{empty} of the {total} answers of {side.name} to {runs[0].title} are empty"
    about = {
        side.name: [run.provenance for of in side.runs.values() for run in of] for side in sides
    }
    for setting in (
        "precision",
        "dtype",
        "load_8bit",
        "load_4bit",
        "conv_mode",
        "temperature",
        "num_beams",
    ):
        used: dict[str, str] = {}
        for name, of in about.items():
            parts = [
                one for p in of for one in (p, p.get("answer_settings")) if isinstance(one, dict)
            ]
            used[name] = "/".join(sorted({str(one[setting]) for one in parts if setting in one}))
        if len({*used.values()} - {""}) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in used.items() if value)
            yield f"the sides differ in their {setting}, which alone may move scores: {listed}"


def compare_benchmark(
    base: Side, new: Side, name: str, *, resamples: int, level: float, seed: int
) -> Row:
    """One benchmark: pair the questions, resample, count wins."""
    base_runs, new_runs, notes = paired_runs(name, base, new)
    first = base_runs[0]
    of_base, of_new = ([run.statistic for run in runs] for runs in (base_runs, new_runs))
    result = compare(
        pair(of_base, of_new, first.clusters), resamples=resamples, level=level, seed=seed
    )
    counted_N = counted([*of_base, *of_new])
    # each question's score, mean over runs
    old_N, now_N = (
        np.mean([run.scores for run in runs], axis=0)[counted_N] for runs in (base_runs, new_runs)
    )
    images = len(
        {cluster for cluster, counts in zip(first.clusters, counted_N, strict=True) if counts}
    )
    said = [[note for run in side.runs[name] for note in run.notes] for side in (base, new)]
    # what both say, without a name
    for side, own, others in ((base, said[0], said[1]), (new, said[1], said[0])):
        notes += [note if note in others else f"{side.name}: {note}" for note in own]
    if images == 1 and len(old_N) > 1:
        notes.append("all questions are about one image, so the interval is meaningless")
    groups, place_N, count_G = np.unique(
        np.array(first.groups)[counted_N], return_inverse=True, return_counts=True
    )
    old_G, now_G = (np.bincount(place_N, score_N) / count_G for score_N in (old_N, now_N))
    return Row(
        benchmark=name,
        title=first.title,
        unit=first.unit,
        base=base.name,
        new=new.name,
        result=result,
        p_holm=result.p,
        wins=int((now_N > old_N).sum()),
        losses=int((now_N < old_N).sum()),
        ties=int((now_N == old_N).sum()),
        questions=len(old_N),
        images=images,
        runs=(len(base_runs), len(new_runs)),
        categories={
            str(groups[one]): (float(old_G[one]), float(now_G[one]), int(count_G[one]))
            for one in np.argsort(-count_G, kind="stable")
            if len(groups) > 1
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def paired_runs(name: str, base: Side, new: Side) -> tuple[list[Run], list[Run], list[str]]:
    """Both sides' runs on the questions that all have, in one order, and notes; ContractError for
    another truth."""
    runs = [*base.runs[name], *new.runs[name]]
    shared = set.intersection(*(set(run.ids) for run in runs))
    largest = max(len(run.ids) for run in runs)
    if len(shared) < FEWEST_IN_COMMON * largest:
        of = f"{len(shared)} questions of {', '.join(str(len(run.ids)) for run in runs)}"
        raise ContractError(
            f"{name}: {base.name} and {new.name} share {of}; evaluate both on the same questions"
        )
    first, *others = (run.pick([one for one in runs[0].ids if one in shared]) for run in runs)
    for run in others:
        for identifier, one, other in zip(run.ids, first.items, run.items, strict=True):
            if one.get("truth") != other.get("truth"):
                both = f"{one.get('truth')!r} in {base.name}, {other.get('truth')!r} in {run.model}"
                raise ContractError(
                    f"{name}: the truth of question {identifier} is {both}; score both by the same annotations"
                )
    notes = (
        []
        if len(shared) == largest
        else [f"{largest - len(shared)} questions are not in every file; ignored"]
    )
    if len({run.provenance.get("data_sha256", "") for run in runs} - {""}) > 1:
        notes.append(
            "the sides were scored with different annotation files; truths in common are equal"
        )
    count = len(base.runs[name])
    return [first, *others][:count], [first, *others][count:], notes


def ordered(names: Iterable[str]) -> list[str]:
    """Benchmarks in the order of tables, unknown ones last, by name."""
    known = list(benchmarks())
    return sorted(
        set(names), key=lambda name: (known.index(name) if name in known else len(known), name)
    )
