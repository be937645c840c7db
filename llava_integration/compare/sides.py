"""The sides of a comparison: the runs of one model on each benchmark, from score files or other evaluators' logs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.benchmark import Benchmark, Item, Statistic, mean_of_parts, mean_statistic
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.benchmarks.rules.mme import paired_accuracy
from llava_integration.compare.readers import Log, read_logs, readers
from llm2clip_plugin.files import ContractError

AGGREGATES = {"": "", "mean of categories": "", "MME": "points", "CIDEr": "CIDEr"}  # of a log -> unit; "": % or score


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model's scores on one benchmark. The lists have a place for each question, in any order."""

    benchmark: str  # runs are compared by it: the name of a rule, or a title of its own
    ids: list[str]  # each once
    scores: list[float]  # higher is better
    clusters: list[str]  # questions of one cluster are resampled together: those about one image
    groups: list[str]  # category in the report
    items: list[Item]  # what else is known: truth; question, answer, image, choices ... for the page
    rule: Benchmark | None = None  # whose headline number is the run's; None: that of ``aggregate``
    aggregate: str = ""  # in AGGREGATES; "": the mean score
    title: str  # in tables
    unit: str = "%"  # of the headline number; scores are from 0 to 1 for "%" and a mean score
    model: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # answered, empty ...
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def statistic(self) -> Statistic:
        """The headline number as a function of sums over the questions."""
        if self.rule:
            return self.rule.statistic(self.items)
        if self.aggregate == "MME":
            return paired_accuracy(self.items, sorted(set(self.groups)))
        if self.aggregate == "mean of categories":
            return mean_of_parts(self.groups, self.scores, self.scale)
        return mean_statistic(self.scores, scale=self.scale)

    @property
    def scale(self) -> float:
        """The number in its unit, of a mean score."""
        return 1.0 if self.unit in ("score", "points") else 100.0

    def pick(self, ids: Sequence[str]) -> "Run":
        """The run on these questions, in their order."""
        place = {name: number for number, name in enumerate(self.ids)}
        chosen = [place[one] for one in ids]
        names = ("ids", "scores", "clusters", "groups", "items")
        return replace(self, **{name: [getattr(self, name)[one] for one in chosen] for name in names})


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model: its name and the runs on each benchmark."""

    name: str
    path: Path
    runs: dict[str, tuple[Run, ...]]
    notes: tuple[str, ...] = ()


def load_side(path: Path, name: str = "") -> Side:
    """Read a score file or another evaluator's log, or all below a folder; several of one benchmark are its runs.

    Raises FileNotFoundError, or ContractError for what can't be read or compared.
    """
    if not path.exists():
        raise FileNotFoundError(f"no score file, log or folder {path}")
    records = read_logs(path)
    if not records:
        raise FileNotFoundError(
            f"{path} has no score files (`llm2clip score BENCHMARK DATA --answers FILE --output FILE` writes them) and "
            f"no logs; known: {', '.join(readers())}; a table needs the columns item and score"
        )
    runs: dict[str, list[Run]] = {}
    notes = []
    for file, record in records:
        run = run_of(file, record)
        earlier = runs.setdefault(run.benchmark, [])
        if any(run.items == other.items for other in earlier):
            notes.append(f"{file} duplicates another file of {run.benchmark}: not counted as another run")
        else:
            earlier.append(run)
    models = {record.model for _, record in records}
    default = path.name if path.is_dir() else models.copy().pop() or path.stem
    return Side(
        name=name or default, path=path, runs={key: tuple(value) for key, value in runs.items()}, notes=tuple(notes)
    )


def run_of(path: Path, record: Log) -> Run:
    """A score file's run, with the headline number of the benchmark's rule unless the items lack what that needs.

    Raises ContractError if the items can't be compared.
    """
    if not record.items:
        raise ContractError(f"{path} has no items; a comparison needs one item per question")
    seen: set[str] = set()
    for number, item in enumerate(record.items):
        if not isinstance(item.get("id"), (str, int)) or "score" not in item:
            raise ContractError(
                f"{path}: item {number} has {sorted(item)}; expected an id (text or number) and a score"
            )
        for key, value in item.items():
            if (key == "score" or isinstance(value, float)) and not (
                isinstance(value, (int, float)) and abs(value) <= 1e12
            ):
                raise ContractError(f"{path}: {key} of item {item['id']!r} is {value!r}, expected a finite number")
        if str(item["id"]) in seen:
            raise ContractError(f"{path} has item {item['id']} twice; score the answers again")
        seen.add(str(item["id"]))
    items, rule, notes = record.items, benchmarks().get(record.benchmark), record.notes
    if rule and (lacking := [name for name in rule.item_fields if any(name not in item for item in items)]):
        notes = [f"items have no {', '.join(lacking)}; mean score instead of {rule.headline}", *notes]
    own = rule if rule and notes is record.notes else None
    scores = [float(item["score"]) for item in items]
    unit = own.unit if own else AGGREGATES[record.aggregate]
    run = Run(
        benchmark=record.benchmark,
        ids=[str(item["id"]) for item in items],
        scores=scores,
        clusters=[str(item.get("cluster", item["id"])) for item in items],
        groups=[str(item.get("category") or "") for item in items],
        items=items,
        rule=own,
        title=rule.title if rule else record.benchmark,
        aggregate=record.aggregate,
        unit=unit or ("%" if all(0 <= score <= 1 for score in scores) else "score"),
        model=record.model,
        counts=record.counts,
        provenance=record.provenance,
        notes=notes,
    )
    number, printed = run.statistic.full(), record.printed
    if printed is None or math.isclose(number, printed * run.scale, rel_tol=1e-3, abs_tol=0.01):
        return run
    said = f"its evaluator printed {printed:.4g}, made of the scores in another way; here {number / run.scale:.4g}"
    return replace(run, notes=[*notes, said])


def load_sides(paths: Sequence[Path], names: Sequence[str]) -> list[Side]:
    """Read all sides; equal names get the parent folder's name or a number."""
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} --names for {len(paths)} sides; pass one name per side, base first")
    sides = [load_side(path, names[place] if names else "") for place, path in enumerate(paths)]
    for rename in (
        lambda place, side: f"{side.path.resolve().parent.name}/{side.path.stem}",
        lambda place, side: f"{side.name} #{place}",
    ):
        shown = [side.name for side in sides]
        sides = [
            replace(side, name=rename(place, side)) if shown.count(side.name) > 1 else side
            for place, side in enumerate(sides)
        ]
    return sides
