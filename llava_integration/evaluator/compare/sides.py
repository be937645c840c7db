"""Sides of a comparison, read from score files and logs: their runs on each benchmark."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_integration.evaluator.benchmarks.benchmark import (
    Benchmark,
    Item,
    Statistic,
    mean_of_parts,
    mean_statistic,
)
from llava_integration.evaluator.benchmarks.rules import benchmarks
from llava_integration.evaluator.benchmarks.rules.mme import paired_accuracy
from llava_integration.evaluator.compare.aggregates import AGGREGATES
from llava_integration.evaluator.compare.readers import (
    BITS,
    BY_PART,
    LABELS_F1,
    LABELS_MCC,
    NO_CHOICES,
    PERPLEXITY,
    Choices,
    Log,
    digest_of,
    read_logs,
    readers,
)
from llava_integration.evaluator.compare.readers.file_formats import (
    EXCEL,
    TABLES,
    ending_of,
    table_problem,
)
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_file


@dataclass(frozen=True, kw_only=True)
class Run(Log):
    """One model's scores on one benchmark. The lists have a place for each item, in any order."""

    ids: list[str]  # each once
    scores: list[float]  # higher is better
    # questions of one cluster are resampled together: those about one image
    clusters: list[str]
    groups: list[str]  # category in the report
    # whose headline number is the run's; None: that of ``aggregate``
    rule: Benchmark | None
    title: str  # in tables
    unit: str  # of the headline number; scores are from 0 to 1 for "%" and a mean score

    @property
    def statistic(self) -> Statistic:
        """The headline number as a function of sums over the questions."""
        if rule := self.rule or benchmarks().get(self.aggregate):
            return rule.statistic(self.items)
        if self.aggregate == "MME":
            return paired_accuracy(self.items, sorted(set(self.groups)))
        if self.aggregate in AGGREGATES:
            return AGGREGATES[self.aggregate](self.items)
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

        def picked(values: list[Any]) -> list[Any]:
            return [values[number] for number in chosen]

        return replace(
            self,
            ids=picked(self.ids),
            scores=picked(self.scores),
            clusters=picked(self.clusters),
            groups=picked(self.groups),
            items=picked(self.items),
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model: its name and the runs on each benchmark."""

    name: str
    path: Path
    runs: dict[str, tuple[Run, ...]]
    notes: tuple[str, ...] = ()


def load_side(
    path: Path | str,
    name: str = "",
    *,
    same_model: bool = False,
    choices: Choices = NO_CHOICES,
    blind: bool = False,
) -> Side:
    """Read a score file or another evaluator's log, or all below a folder; several of one benchmark
    are its runs. Raises FileNotFoundError, or ContractError for what can't be read or compared,
    such as logs of several models, unless they are said to be runs of the ``same_model``. Answers
    without the pictures are read if, and only if, it is to be ``blind``, as far as logs tell."""
    path = Path(path)
    runs, notes = load_runs(path, choices, blind=blind)
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
    sides = [side_of(path, of_model, name, notes) for name, of_model in models.items()]
    with_number = [f"{side.name} #{number}" for number, side in enumerate(sides)]
    return rename_equal(sides, with_number)


def side_of(path: Path, runs: Sequence[Run], name: str, notes: Sequence[str]) -> Side:
    """The side of these runs, by benchmark; without a ``name`` it has the model's or the file's."""
    by_benchmark: dict[str, tuple[Run, ...]] = {}
    for run in runs:
        by_benchmark[run.benchmark] = (*by_benchmark.get(run.benchmark, ()), run)
    return Side(
        name=name or runs[0].model or path.stem,
        path=path,
        runs=by_benchmark,
        notes=tuple(notes),
    )


def load_runs(
    path: Path, choices: Choices, *, blind: bool = False
) -> tuple[list[Run], list[str]]:
    """All runs in a file or below a folder, and notes on what is left out. Raises
    FileNotFoundError, or ContractError if nothing can be compared."""
    if not path.exists():
        raise FileNotFoundError(f"no score file, log or folder {path}")
    records = read_logs(path, choices)
    read = [file for _, record in records for file in record.files]
    problems = table_problems(path, read)
    if not records and problems:
        raise ContractError("; ".join(problems))
    if not records:
        raise FileNotFoundError(
            f"{path} has no score files (`llm2clip score` writes them) and no logs; known: "
            f"{', '.join(readers())}; a table (.csv, .tsv, .jsonl, .xlsx, or .json with an array "
            "of rows) needs the columns item and score"
        )
    runs = []
    notes = [f"left out: {problem}" for problem in problems]
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
            check_eyes(file, record, blind=blind)
            runs.append(run_of(file, record))
        except ContractError as error:
            if len(records) == 1:
                raise
            notes.append(f"left out: {error}")
    if not runs:
        raise ContractError("; ".join(notes))
    return runs, notes


def table_problems(path: Path, read: Collection[Path]) -> list[str]:
    """Why tables at a path, or the file itself, are not among the files that were ``read``."""
    files = [path]
    if path.is_dir():
        files = []
        for file in sorted(path.rglob("*")):
            # the answers of a judged table that was read take seconds to open
            is_answers = any(other.name.startswith(file.stem) for other in read)
            ending = ending_of(file)
            if ending in TABLES or (ending == EXCEL and not is_answers):
                files.append(file)
    problems = []
    for file in files:
        if file.is_file() and file not in read and (reason := table_problem(file)):
            problems.append(reason)
    return problems


def check_eyes(file: Path, record: Log, *, blind: bool) -> None:
    """Raises ContractError for answers without the pictures where they are not wanted, and for
    answers with them where they are not, of logs that say how they were made."""
    settings = record.provenance.get("answer_settings")
    if not isinstance(settings, dict):
        return
    was_blind = bool(settings.get(BLIND))
    if was_blind and not blind:
        raise ContractError(
            f"{file} has answers without the pictures (bench-mllm --blind); pass it to --blind"
        )
    if blind and not was_blind:
        raise ContractError(
            f"{file} has answers with the pictures; --blind needs those of bench-mllm --blind"
        )


def copied_logs(records: Iterable[tuple[Path, Log]]) -> dict[str, dict[Path, Path]]:
    """Benchmark -> each log that is another by another path, has the same bytes, or is the same
    table in another format (a.xlsx next to a.csv) -> the first of them. Other logs with the same
    scores are no copies."""
    sha256_of: dict[Path, str] = {}
    first_of: dict[tuple[str, ...], Path] = {}
    copies: dict[str, dict[Path, Path]] = {}
    for path, record in records:
        for file in record.files:
            if file not in sha256_of:
                sha256_of[file] = sha256_file(file)
        digests = [sha256_of[file] for file in record.files]
        scores = [(item.get("id"), item.get("score")) for item in record.items]
        about = (record.benchmark, record.model)
        same_bytes = (*about, *digests)
        same_table = (*about, record.run, str(path.with_suffix("")), digest_of(scores))
        for key in (same_bytes, same_table):
            first = first_of.setdefault(key, path)
            if first != path:
                copies.setdefault(record.benchmark, {})[path] = first
    return copies


# answer setting of answers to gray pictures
BLIND = "blind"
# what tells runs of one model apart in its name
# doubao-seed-1 and seed1.5 are models: a seed's number follows at once, and is whole
SEED = re.compile(r"(?<![a-z])(seed|run)=?\d+(?![a-z\d]|\.\d)", re.IGNORECASE)


def model_of(run: Run) -> str:
    """The run's model, without the number of a seed."""
    return SEED.sub(r"\1", run.model)


# the number of a run; of "run2_seed1" it is the seed's
RUN_NUMBERS = [
    re.compile(rf"(?<![a-z]){word}[=_ -]?(\d+)(?![a-z\d])", re.IGNORECASE)
    for word in ("seed", "run")
]


def run_number(run: Run) -> int | None:
    """The number (seed) of a run, by its model's name, its file's or the nearest folder's; None if
    none says one."""
    # a column of whole numbers may have become 1.0
    names = [run.run.removesuffix(".0"), run.model]
    for file in run.files:
        names.append(file.name.split(".")[0])
        names += [folder.name for folder in file.parents]
    for name in names:
        for pattern in RUN_NUMBERS:
            if match := pattern.search(name):
                return int(match[1])
        if re.fullmatch(r"\d+", name, re.ASCII):
            return int(name)
    return None


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
UNIT_OF_AGGREGATE = {
    "MME": "points",
    "CIDEr": "CIDEr",
    "pope": "F1",
    LABELS_F1: "F1",
    LABELS_MCC: "MCC",
    PERPLEXITY: "score",
    BITS: "score",
}


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
    counts = Counter(str(item["id"]) for item in items)
    most_common, times = counts.most_common(1)[0]
    if times > 1:
        raise ContractError(
            f"{path} has item {most_common} twice; score the answers again"
        )


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
    if not math.isfinite(number):
        raise ContractError(
            f"{path}: {run.title} is {number}, expected a finite number"
        )
    printed = record.printed
    if printed is None or is_printed(number, printed, run):
        return run
    why = "made of the scores in another way, or of documents that the log lacks"
    if record.documents:
        logged, evaluated = record.documents
        why = "made of the scores in another way"
        if logged < evaluated:
            why = f"of {evaluated:,} documents, of which the log has {logged:,}"
    differs = (
        f"its evaluator printed {printed:.4g}, {why}; here {number / run.scale:.4g}"
    )
    return replace(run, notes=[*notes, differs])


def is_printed(number: float, printed: float, run: Run) -> bool:
    """Whether a headline number is the one that was printed, as a share or in percent."""
    readings = [printed * run.scale]
    if run.unit == "%":
        readings.append(printed)
    for reading in readings:
        if math.isclose(number, reading, rel_tol=1e-3, abs_tol=0.01):
            return True
    return False


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
    with_folder = [
        f"{side.path.resolve().parent.name}/{side.path.stem}" for side in sides
    ]
    sides = rename_equal(sides, with_folder)
    with_number = [f"{side.name} #{number}" for number, side in enumerate(sides)]
    sides = rename_equal(sides, with_number)
    return with_common_task(sides)


UNNAMED = "scores"  # the task of tables that name none


def with_common_task(sides: Sequence[Side]) -> list[Side]:
    """The sides, of which those with a single table that names no task get the task of the others,
    or UNNAMED: two tables of a few columns are of the same items."""
    if any(len(side.runs) != 1 for side in sides):
        return list(sides)
    all_names = set()
    named = set()
    for side in sides:
        for name, runs in side.runs.items():
            all_names.add(name)
            if runs[0].named:
                named.add(name)
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
