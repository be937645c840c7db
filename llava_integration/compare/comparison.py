"""A comparison: score files paired by question id, statistics for each benchmark and pair of sides."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

from llava_integration.benchmarks.benchmark import Item, Statistic, mean_of_parts, mean_statistic
from llava_integration.benchmarks.rules import benchmarks, published
from llava_integration.compare.sides import Side
from llava_integration.compare.statistics import Difference, compare, counted, holm, pair
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


def compare_benchmark(base: Side, new: Side, name: str, *, resamples: int, level: float, seed: int) -> Row:
    """One benchmark: pair the questions, resample, count wins."""
    base_runs, new_runs = base.runs[name], new.runs[name]
    common, notes = questions_in_common(name, base, new)
    base_items, new_items = ([pick(record, common) for record in runs] for runs in (base_runs, new_runs))
    statistics = [[statistic_of(name, items) for items in side] for side in (base_items, new_items)]
    _, title, unit, note = statistics[0][0]
    clusters = [str(item.get("cluster", item["id"])) for item in base_items[0]]
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
