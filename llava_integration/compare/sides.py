"""The sides of a comparison: the runs of one model on each benchmark, as a reader of scores or logs makes them.

Score files of ``llm2clip evaluate`` become a run for each recall: in each direction, overall and by part. Their items
are queries with ``side`` (i2t, t2i), ``part`` ("all", "long:en" ...) and a hit for each k (``r1`` ...); SugarCrepe's
are pairs of captions without a side, whose ``part`` is one of seven groups with equal weight. XM3600's number is the
mean over its languages, each with its own candidates.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.benchmark import Item, Statistic, mean_of_parts, mean_statistic
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.compare.readers import read_logs, readers
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError

OVERALL = "all"  # the part with every caption
DIRECTIONS = {"i2t": "image→text", "t2i": "text→image"}
MOST_PARTS = 8  # more would dominate the table, and Holm's correction costs every row power


def mean_score(run: "Run") -> Statistic:
    """The composite of most benchmarks: the mean score, percent if the unit is."""
    return mean_statistic(run.scores, scale=100.0 if run.unit == "%" else 1.0)


def mean_of_groups(run: "Run") -> Statistic:
    """The mean over the groups of a group's mean score."""
    return mean_of_parts(run.groups, run.scores, 100.0 if run.unit == "%" else 1.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model's scores on one benchmark. The lists have a place for each question, in any order."""

    benchmark: str  # runs are compared by it: the name of a rule, or a title of its own
    ids: list[str]  # each once
    scores: list[float]  # higher is better
    clusters: list[str]  # questions of one cluster are resampled together: those about one image
    groups: list[str]  # category in the report
    items: list[Item]  # what else is known, {} for nothing: truth; question, answer, image, choices ... for the page
    composite: Callable[["Run"], Statistic] = mean_score  # the headline number of this run, or of a part of it
    title: str  # in tables
    unit: str = "%"  # of the headline number; scores are from 0 to 1 for "%" and a mean score
    model: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # answered, empty ...
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def statistic(self) -> Statistic:
        """The headline number as a function of sums over the questions."""
        return self.composite(self)

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
    own = [file for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path]) if _is_score_file(file)]
    records = [(file, ScoreFile.read(file)) for file in own] or read_logs(path)
    if not records:
        raise FileNotFoundError(
            f"{path} has no score files (`llm2clip score BENCHMARK DATA --answers FILE --output FILE` writes them) and "
            f"no logs of {', '.join(readers())}; a table needs the columns item and score"
        )
    runs: dict[str, list[Run]] = {}
    notes = []
    for file, record in records:
        _check(file, record)
        for run in runs_of(record):
            earlier = runs.setdefault(run.benchmark, [])
            if any((run.ids, run.scores, run.items) == (other.ids, other.scores, other.items) for other in earlier):
                notes.append(f"{file} duplicates another file of {run.benchmark}: not counted as another run")
            else:
                earlier.append(run)
    models = {record.model for _, record in records}
    default = path.name if path.is_dir() else models.copy().pop() or path.stem
    return Side(
        name=name or default, path=path, runs={key: tuple(value) for key, value in runs.items()}, notes=tuple(notes)
    )


def _is_score_file(path: Path) -> bool:
    """Whether a file is a score file; others below a folder are ignored."""
    if path.suffix != ".json" or path.name.endswith(".scores.json"):
        return path.suffix == ".json"
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(head, dict) and head.get("kind") == ScoreFile.KIND


def _check(path: Path, record: ScoreFile) -> None:
    """ContractError if a score file's items can't be compared."""
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


def runs_of(record: ScoreFile) -> list[Run]:
    """One run for each part, direction and k if the items are queries in both directions; else one of all items."""
    if record.benchmark == "retrieval:sugarcrepe":
        return [_run(record, "sugarcrepe", record.items, group="part", composite=mean_of_groups)]
    if any("side" not in item or "r1" not in item for item in record.items):
        return [_run(record, record.benchmark, record.items)]
    if record.benchmark == "retrieval:xm3600":
        items = [item for item in record.items if item.get("part", OVERALL) != OVERALL]
        return _recalls(record, "xm3600", items or record.items, ("r1", "r10"), group="part", composite=mean_of_groups)
    parts = list(dict.fromkeys(str(item.get("part", OVERALL)) for item in record.items))
    if len(parts) > MOST_PARTS + 1:
        record = replace(record, notes=[*record.notes, f"{len(parts)} parts: only the overall number is compared"])
        parts = [part for part in parts if part == OVERALL] or parts[:MOST_PARTS]
    name, runs = record.benchmark.removeprefix("retrieval:"), []
    for part in parts:
        items = [item for item in record.items if item.get("part", OVERALL) == part]
        overall = part == OVERALL
        runs += _recalls(record, name if overall else f"{name} {part}", items, ("r1", "r10") if overall else ("r1",))
    return runs


def _recalls(record: ScoreFile, name: str, items: Sequence[Item], ks: Sequence[str], **more: Any) -> list[Run]:
    """A run for each direction and k."""
    runs = []
    for side, arrow in DIRECTIONS.items():
        chosen = [item for item in items if item["side"] == side]
        for k in ks:
            if chosen and all(k in item for item in chosen):
                hits = [{**item, "score": item[k]} for item in chosen]
                runs.append(_run(record, f"{name} {arrow} R@{k[1:]}", hits, **more))
    return runs


def _run(
    record: ScoreFile,
    name: str,
    items: list[Item],
    *,
    group: str = "category",
    composite: Callable[[Run], Statistic] = mean_score,
) -> Run:
    """A run of a score file's items; ``group``: the field that is their group.

    The number is that of the benchmark's rule, unless the items lack what it needs.
    """
    scores = [float(item["score"]) for item in items]
    unit, notes = "%" if all(0 <= score <= 1 for score in scores) else "score", record.notes
    rule = benchmarks().get(name)
    if rule:
        missing = [field for field in rule.item_fields if any(field not in item for item in items)]
        if missing:
            notes = [f"items have no {', '.join(missing)}; mean score instead of {rule.headline}", *notes]
        else:
            unit, composite = rule.unit, lambda run: rule.statistic(run.items)
    return Run(
        benchmark=name,
        ids=[str(item["id"]) for item in items],
        scores=scores,
        clusters=[str(item.get("cluster", item["id"])) for item in items],
        groups=[str(item.get(group) or "") for item in items],
        composite=composite,
        title=rule.title if rule else name,
        unit=unit,
        items=items,
        model=record.model,
        counts=record.counts,
        provenance=record.provenance,
        notes=notes,
    )
