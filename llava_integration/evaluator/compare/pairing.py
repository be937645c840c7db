"""Two sides on the same questions: runs paired by question id, in one grouping and on one scale."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from llava_integration.evaluator.benchmarks.rules import benchmarks
from llava_integration.evaluator.compare.readers import BY_PART
from llava_integration.evaluator.compare.sides import Run, Side, run_number
from llm2clip_plugin.errors import ContractError

MIN_OVERLAP = 0.9  # fraction of questions that both sides must have
OTHER_FILES = (
    "the sides were scored with different annotation files; truths in common are equal"
)
OTHER_DATA = (
    "the sides were measured on different images, captions or classes, though their names are "
    "equal: that alone moves scores; measure both on the same data"
)


def paired_runs(
    name: str, base: Side, new: Side, *, min_overlap: float = MIN_OVERLAP
) -> tuple[list[Run], list[Run], list[str]]:
    """Both sides' runs on the questions that all have, in one order, and notes; ContractError for
    another truth, or if less than ``min_overlap`` of the questions are in common."""
    runs = [*base.runs[name], *new.runs[name]]
    shared = set.intersection(*(set(run.ids) for run in runs))
    largest = max(len(run.ids) for run in runs)
    if not shared or len(shared) < min_overlap * largest:
        counts = ", ".join(str(len(run.ids)) for run in runs)
        raise ContractError(
            f"{name}: {base.name} and {new.name} share {len(shared)} questions of {counts}; "
            "evaluate both on the same questions, or lower --min-overlap"
        )
    shared_ids = [identifier for identifier in runs[0].ids if identifier in shared]
    runs = [run.pick(shared_ids) for run in runs]
    for run in runs[1:]:
        check_equal_truth(name, base, runs[0], run)
    check_equal_categories(name, base, runs)
    runs, notes = in_joint_clusters(runs)
    if len(shared) < largest:
        notes.append(
            f"{largest - len(shared)} questions are not in every file; ignored"
        )
    digests = {run.provenance.get("data_sha256", "") for run in runs}
    if len(digests - {""}) > 1:
        # scores of `llm2clip evaluate` name the tower, or the LLM
        are_ours = any(
            {"weights_sha256", "teacher"} & run.provenance.keys() for run in runs
        )
        notes.append(OTHER_DATA if are_ours else OTHER_FILES)
    count = len(base.runs[name])
    return runs[:count], runs[count:], notes


def check_equal_truth(name: str, base: Side, first: Run, other: Run) -> None:
    """Raises ContractError if two runs on the same questions have different truths for one."""
    for identifier, item, other_item in zip(
        first.ids, first.items, other.items, strict=True
    ):
        truth = item.get("truth")
        other_truth = other_item.get("truth")
        # versions of an evaluator write a number or its text
        if truth != other_truth and str(truth) != str(other_truth):
            raise ContractError(
                f"{name}: the truth of question {identifier} is {truth!r} in {base.name}, "
                f"{other_truth!r} in {other.model}; score both by the same annotations"
            )


def check_equal_categories(name: str, base: Side, runs: Sequence[Run]) -> None:
    """Raises ContractError if the number is the mean of categories, and two runs have a question in
    different ones."""
    first, *others = runs
    for other in others:
        if BY_PART not in (first.aggregate, other.aggregate):
            continue
        for identifier, group, other_group in zip(
            first.ids, first.groups, other.groups, strict=True
        ):
            if group != other_group:
                raise ContractError(
                    f"{name}: the category of question {identifier} is {group!r} in {base.name}, "
                    f"{other_group!r} in {other.model or 'another run'}; its number is the mean of "
                    "categories"
                )


def in_joint_clusters(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with one grouping, and notes: questions that go together in any of them go together
    in all, whichever is the base."""
    if all(run.clusters == runs[0].clusters for run in runs):
        return list(runs), []
    # union-find over the questions' numbers
    parents = list(range(len(runs[0].ids)))

    def root(question: int) -> int:
        while parents[question] != question:
            parents[question] = parents[parents[question]]
            question = parents[question]
        return question

    for run in runs:
        first_of: dict[str, int] = {}
        for question, cluster in enumerate(run.clusters):
            first = first_of.setdefault(cluster, question)
            parents[root(question)] = root(first)
    ids = runs[0].ids
    clusters = [ids[root(question)] for question in range(len(ids))]
    joined = len(set(clusters))
    counts = [len(set(run.clusters)) for run in runs]
    notes = []
    if max(counts) > joined and min(counts) == joined:
        notes.append(
            "not every log tells which items go together; the grouping of those that do is used"
        )
    elif max(counts) > joined:
        notes.append(
            "the logs group the items in different ways; what one of them joins is joined"
        )
    return [replace(run, clusters=clusters) for run in runs], notes


def matched_by_number(
    name: str, base: tuple[Side, Sequence[Run]], new: tuple[Side, Sequence[Run]]
) -> tuple[list[Run], list[Run], list[str]]:
    """Both sides' runs in the order of their numbers (seeds), and notes; in the order of their
    files if some run has no number. Raises ContractError if the sides' numbers differ."""
    base_side, base_runs = base
    new_side, new_runs = new
    if len(base_runs) != len(new_runs):
        raise ContractError(
            f"{name}: {base_side.name} has {len(base_runs)} runs and {new_side.name} "
            f"{len(new_runs)}; --paired-runs needs one of each seed on both sides"
        )
    base_numbered = by_number(base_runs)
    new_numbered = by_number(new_runs)
    if not base_numbered or not new_numbered:
        if len(base_runs) == 1:
            return list(base_runs), list(new_runs), []
        without = []
        if not base_numbered:
            without.append(base_side.name)
        if not new_numbered:
            without.append(new_side.name)
        note = (
            f"not all runs of {' and '.join(without)} have a number of their own: the first of one "
            "side is paired with that of the other"
        )
        return list(base_runs), list(new_runs), [note]
    if set(base_numbered) != set(new_numbered):
        listed = []
        for side, numbered in ((base_side, base_numbered), (new_side, new_numbered)):
            listed.append(f"{side.name} has {', '.join(map(str, sorted(numbered)))}")
        raise ContractError(
            f"{name}: the sides have runs of other numbers ({'; '.join(listed)}); --paired-runs "
            "needs one of each seed on both sides"
        )
    order = sorted(base_numbered)
    in_order = [base_numbered[number] for number in order]
    return in_order, [new_numbered[number] for number in order], []


def by_number(runs: Sequence[Run]) -> dict[int, Run]:
    """The runs by their numbers; empty if one has none, or another's."""
    numbered = {}
    for run in runs:
        number = run_number(run)
        if number is None or number in numbered:
            return {}
        numbered[number] = run
    return numbered


def ordered(names: Iterable[str]) -> list[str]:
    """Benchmarks in the order of tables, unknown ones last, by name."""
    position = {name: number for number, name in enumerate(benchmarks())}
    return sorted(
        set(names), key=lambda name: (position.get(name, len(position)), name)
    )


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


def check_scales(sides: Sequence[Side]) -> tuple[list[str], dict[str, str]]:
    """Warnings about benchmarks whose scores are at most 1 in one run and above in another; and, by
    name, what is wrong with those whose scores are clearly shares and percentages."""
    warnings = []
    refused = {}
    for name in ordered(name for side in sides for name in side.runs):
        largest = largest_scores(name, sides)
        shares = {run: most for run, most in largest.items() if 0 < most <= 1}
        others = {run: most for run, most in largest.items() if most >= 2}
        if not shares or not others:
            continue
        scales = (
            f"scores on {name} are at most {max(shares.values()):g} in "
            f"{', '.join(shares)} and go to {max(others.values()):g} in "
            f"{', '.join(others)}"
        )
        if max(others.values()) >= PERCENT:
            refused[name] = f"{scales}; write both from 0 to 1, or both from 0 to 100"
            continue
        warnings.append(
            f"{scales}: if these are two scales, the difference means nothing"
        )
    return warnings, refused


def largest_scores(name: str, sides: Sequence[Side]) -> dict[str, float]:
    """Run -> the largest score on a benchmark, of those whose number is a mean of scores. A run is
    called as its side, and, if that has several, as its file."""
    largest = {}
    for side in sides:
        runs = side.runs.get(name, ())
        for number, run in enumerate(runs, 1):
            if run.rule is not None or run.aggregate not in ("", BY_PART):
                continue
            title = side.name
            if len(runs) > 1:
                file_name = run.files[0].name if run.files else f"run {number}"
                title = f"{side.name} ({file_name})"
            largest[title] = max([largest.get(title, 0.0), *map(abs, run.scores)])
    return largest


def benchmarks_in_common(base: Side, new: Side) -> list[str]:
    """The benchmarks that both sides have, in the order of tables; ValueError if there is none."""
    shared = ordered(set(base.runs) & set(new.runs))
    if not shared:
        of_base, of_new = (
            f"{side.name} ({', '.join(ordered(side.runs))})" for side in (base, new)
        )
        raise ValueError(f"{of_base} and {of_new} have no benchmark in common")
    return shared


def one_sided_notes(base: Side, new: Side, *, names_pair: bool = False) -> list[str]:
    """A note for each benchmark that one of two sides lacks; with ``names_pair`` it names both, of
    which others may be compared."""
    notes = []
    for name in ordered(set(base.runs) ^ set(new.runs)):
        only = base.name if name in base.runs else new.name
        pair_text = f" between {base.name} and {new.name}" if names_pair else ""
        notes.append(f"{name} is not compared{pair_text}: only {only} has its scores")
    return notes
