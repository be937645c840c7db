"""The quickstart's tables of retrieval: R@1 and R@10 of the towers, top-1 of the teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from page import Table, cell
from scores import SIDES, TowerScores

TEACHERS = {  # part of a folder's name -> what the table calls it
    "raw": "raw LLM, read well",
    "tuned": "fine-tuned LLM",
    "plain": "raw LLM, as it comes",
    "random": "random embeddings",
    "shuffled": "control: wrong pictures",
}


@dataclass(frozen=True, kw_only=True)
class Tower:
    """An exported tower and its measurements."""

    name: str  # of TEACHERS
    seed: int
    scores: TowerScores


def by_name(towers: Sequence[Tower]) -> dict[str, list[Tower]]:
    """Name -> towers of its seeds, in the order of ``TEACHERS``."""
    groups = {name: [tower for tower in towers if tower.name == name] for name in TEACHERS}
    return {name: seeds for name, seeds in groups.items() if seeds}


def heads(groups: Mapping[str, Sequence[object]]) -> list[str]:
    """Column names of the tables."""
    return [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]


def recalls(tests: Sequence[Mapping[str, float]], side: str) -> str:
    """``R@1 / R@10``, mean and deviation over seeds."""
    return " / ".join(cell([test[f"{side}_r{k}"] for test in tests]) for k in (1, 10))


def retrieval_table(towers: Sequence[Tower]) -> Table:
    """A row per test, a column per tower."""
    groups = by_name(towers)
    scores = {name: [tower.scores.tests() for tower in seeds] for name, seeds in groups.items()}
    rows = []
    for test, chance in towers[0].scores.tests(chance=True).items():
        for side, title in SIDES.items():
            cells = [recalls([tests[test] for tests in seeds], side) for seeds in scores.values()]
            rows.append([f"{test}, {title}", *cells, recalls([chance], side)])
    below = (
        "R@1 / R@10, mean over galleries of one style each. Training saw no drawing of these families. "
        "± is the standard deviation over seeds; ties count half."
    )
    title = "How often is the right one first, and among the first ten?"
    return Table(head=["retrieval", *heads(groups), "chance"], rows=rows, below=below, title=title)


def language_table(towers: Sequence[Tower]) -> Table:
    """A row per language, a column per tower: retrieval of images by name."""
    groups = by_name(towers)
    rows = [
        [
            tag,
            *(
                recalls([tower.scores.part("test", "short", tag) for tower in seeds], "t2i")
                for seeds in groups.values()
            ),
        ]
        for tag in towers[0].scores.languages
    ]
    below = "Name → image on the test families, R@1 / R@10. The towers were trained on English captions only."
    title = "Which languages does the tower understand?"
    return Table(head=["language", *heads(groups)], rows=rows, below=below, title=title)


def teacher_table(teachers: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """The teachers' caption-to-caption retrieval, without a tower."""
    tests = next(iter(teachers.values()))[0]
    rows = [[test, *(cell([scores[test] for scores in seeds]) for seeds in teachers.values())] for test in tests]
    below = (
        "Top-1 retrieval from caption to caption on the test families: plain, and with the mean embedding subtracted."
    )
    title = "What does the teacher know, without a tower?"
    return Table(head=["teacher", *(TEACHERS[name] for name in teachers)], rows=rows, below=below, title=title)
