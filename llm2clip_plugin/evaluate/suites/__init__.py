"""The retrieval benchmarks by name, one file each, read from files that users download themselves.

A file defines ``SUITE``; a new file in this folder is a new suite (`llm2clip_plugin.files`).
"""

from llm2clip_plugin.evaluate.suites.base import Suite
from llm2clip_plugin.files import discover
from llm2clip_plugin.options import unknown


def suites() -> dict[str, Suite]:
    """Every suite by name, in the order of the paper's tables; further ones follow by name."""
    members = discover(__name__, "SUITE").values()
    return {suite.name: suite for suite in sorted(members, key=lambda suite: (suite.order, suite.name))}


def select_suites(names: str) -> list[Suite]:
    """The suites of a comma-separated list of names, ``paper`` and ``all``.

    Raises ValueError for an unknown name, listing the known ones.
    """
    known = suites()
    groups = {"paper": [name for name, suite in known.items() if suite.paper], "all": list(known)}
    selected: dict[str, Suite] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known and name not in groups:
            raise ValueError(unknown("suite", name, [*groups, *known]))
        selected |= {member: known[member] for member in groups.get(name, [name])}
    return list(selected.values())
