#!/usr/bin/env python3
"""What more steps of stage 2 bring: retrieval on test families by towers of few steps and of many.

    longer.py --data OUT/data --outputs OUT/table OUT/gate-200-steps OUT/gate-800-steps

Reads ``all/`` and ``cache/`` below ``--data``, and the towers of the raw LLM, the linear map and
the fine-tuned LLM below each of ``--outputs``; writes ``longer.json`` below the one of most steps.
A tower counts if another folder has its teacher and seed, and each number of steps is compared with
the next lower one.
Differences are paired by query and by seed; intervals are over families and seeds. p is given for
names in languages of neither stage, caption → image, alone, and is adjusted for that row's
comparisons (Holm).

``--rendered``: a folder with a drawing of each test concept, named by its code points
(``1f600.webp``), as ``assets`` of the npm package ``@lobehub/fluent-emoji-3d``: one more style of
which training saw nothing.

Shapes: S seeds, Q queries.
"""

import argparse
import functools
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from claims import LEVEL, compare_seeds
from gate import max_steps
from inputs import SIZE
from measure import (
    SIDES,
    TEACHERS,
    Rows,
    check_run,
    evaluate_tower,
    open_caches,
    open_sets,
    rows_of,
    tower_queries,
)
from PIL import Image

from llava_integration.evaluator.compare.multiplicity import holm
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.data.samples import Sample
from llm2clip_plugin.data.sources import Source, shards_of
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.report_text import estimate, markdown_table, p_value, spread

ARMS = ("raw", "map", "tuned")
ENDPOINT = "names in languages of neither stage, caption → image"
RENDERED = "rendered style"
# kind of caption -> row of the table
RENDERED_TESTS = {
    "long": f"{RENDERED}, long captions",
    "other": f"{RENDERED}, names in languages of neither stage",
}

Towers = dict[str, dict[int, Rows]]  # teacher -> seed -> what its tower reaches
Comparison = dict[str, Any]


# Pictures in one more style


class Redrawn(Source):
    """The samples of a source whose concepts have a drawing below ``drawings``, with that drawing
    on white. Raises FileNotFoundError if none has."""

    def __init__(self, source: Source, drawings: Path) -> None:
        self.source = source
        file_of = {}
        for file in drawings.glob("*.webp"):
            points = file.stem.lower().split("-")
            file_of["-".join(point for point in points if point != "fe0f")] = file
        self.numbers: list[int] = []  # in the source
        self.drawings: list[Path] = []
        for number in range(len(source)):
            concept = source[number].meta["concept"]
            if concept in file_of:
                self.numbers.append(number)
                self.drawings.append(file_of[concept])
        if not self.numbers:
            raise FileNotFoundError(
                f"{drawings} has no drawing of a test concept, as 1f600.webp"
            )
        shards = shards_of([source.shards[0].name], [len(self.numbers)])
        super().__init__(source.config, shards)

    def record(self, number: int) -> Sample:
        read_image = functools.partial(on_white, self.drawings[number])
        sample = self.source.record(self.numbers[number])
        return replace(sample, read_image=read_image)

    def place(self, number: int) -> tuple[int, int]:
        return self.source.place(self.numbers[number])  # of its captions in the cache


def on_white(drawing: Path) -> bytes:
    """A PNG of ``SIZE`` pixels."""
    with Image.open(drawing) as opened:
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    small = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE))
    png = io.BytesIO()
    small.save(png, "png")
    return png.getvalue()


# Towers


def measure(path: Path, sets: Mapping[str, list[Source]], caches: Any) -> Rows:
    """What a tower reaches in every test, in both directions."""
    check_run(path)
    reports = evaluate_tower(path, sets, caches)
    rows = rows_of(reports)
    if RENDERED in reports:
        for kind, test in RENDERED_TESTS.items():
            for side, title in SIDES.items():
                rows[f"{test}, {title}"] = tower_queries(reports[RENDERED], kind, side)
    return rows


def trained_towers(output: Path) -> dict[str, Path]:
    """``ARM-seedN`` -> the tower, of a folder."""
    towers = {}
    for arm in ARMS:
        for path in sorted((output / "towers").glob(f"{arm}-seed*")):
            towers[path.name] = path
    return towers


def towers_by_steps(outputs: Sequence[Path]) -> dict[int, list[Path]]:
    """Steps, few first -> the towers whose teacher and seed another of ``outputs`` has, too. Raises
    FileNotFoundError without any, ContractError for a folder with several numbers of steps, or two
    folders with the same."""
    found = {output: trained_towers(output) for output in outputs}
    count = Counter(name for towers in found.values() for name in towers)
    of_steps: dict[int, list[Path]] = {}
    for output, towers in found.items():
        shared = [path for name, path in towers.items() if count[name] > 1]
        if not shared:
            continue
        steps = sorted({max_steps(path) for path in shared})
        if len(steps) > 1:
            raise ContractError(
                f"{output / 'towers'} has towers of {steps} steps; expected one number"
            )
        if steps[0] in of_steps:
            raise ContractError(
                f"{output / 'towers'} has towers of {steps[0]} steps, as another folder"
            )
        of_steps[steps[0]] = shared
    if not of_steps:
        folders = ", ".join(str(output / "towers") for output in outputs)
        raise FileNotFoundError(f"{folders} share no tower of {', '.join(ARMS)}")
    return dict(sorted(of_steps.items()))


# What it shows


def compare(
    test: str, title: str, old: Mapping[int, Rows], new: Mapping[int, Rows]
) -> Comparison:
    """New minus old in a test, of the seeds that both have."""
    seeds = sorted(old.keys() & new.keys())
    difference_SQ = [new[seed][test].scores - old[seed][test].scores for seed in seeds]
    result = compare_seeds(difference_SQ, old[seeds[0]][test].clusters)
    return {
        "test": test,
        "comparison": title,
        "seeds": seeds,
        "old": [float(old[seed][test].scores.mean()) for seed in seeds],
        "new": [float(new[seed][test].scores.mean()) for seed in seeds],
        "difference": float(np.mean(difference_SQ)),
        "interval": list(result.interval(1 - LEVEL)),
        "p": result.p(),
    }


def compare_all(
    test: str, towers: Mapping[int, Towers]
) -> tuple[list[Comparison], list[Comparison]]:
    """What a test gains by steps, of each teacher; and the fine-tuned LLM minus the others after as
    many. ``towers``: by steps, few first."""
    gains = []
    for short, long in itertools.pairwise(towers):
        for arm in ARMS:
            old = towers[short].get(arm, {})
            new = towers[long].get(arm, {})
            if old.keys() & new.keys():
                row = compare(test, TEACHERS[arm], old, new)
                gains.append({**row, "steps": [short, long]})
    others = []
    for steps, of_steps in towers.items():
        for base in ("raw", "map"):
            old = of_steps.get(base, {})
            new = of_steps.get("tuned", {})
            if old.keys() & new.keys():
                title = f"{steps} steps: {TEACHERS['tuned']} minus {TEACHERS[base]}"
                others.append(compare(test, title, old, new))
    return gains, others


def adjust(comparisons: Sequence[Comparison]) -> None:
    """Add ``p_adjusted`` to those of the endpoint."""
    of_endpoint = [row for row in comparisons if row["test"] == ENDPOINT]
    adjusted = holm([row["p"] for row in of_endpoint])
    for row, p in zip(of_endpoint, adjusted, strict=True):
        row["p_adjusted"] = p


def p_cell(row: Comparison) -> str:
    """Of the endpoint alone."""
    if "p_adjusted" not in row:
        return ""
    shown = "" if row["p_adjusted"] < LEVEL else ", not shown"
    return p_value(row["p_adjusted"]) + shown


def gains_table(rows: Sequence[Comparison]) -> str:
    """A row per test, teacher and pair of numbers of steps."""
    cells = []
    for row in rows:
        change = estimate(row["difference"], row["interval"])
        steps = " → ".join(str(number) for number in row["steps"])
        levels = f"{spread(row['old'])} → {spread(row['new'])}"
        seeds = str(len(row["seeds"]))
        cells.append(
            (row["test"], row["comparison"], seeds, steps, levels, change, p_cell(row))
        )
    head = ("test families", "teacher of the tower", "seeds", "steps")
    head += ("fewer → more", "difference", "p (Holm)")
    return markdown_table(head, cells)


def others_table(rows: Sequence[Comparison]) -> str:
    """A row per test and pair of teachers."""
    cells = []
    for row in rows:
        change = estimate(row["difference"], row["interval"])
        seeds = str(len(row["seeds"]))
        cells.append((row["test"], row["comparison"], seeds, change, p_cell(row)))
    head = ("test families", "teachers", "seeds", "difference", "p (Holm)")
    return markdown_table(head, cells)


def make_report(data: Path, outputs: Sequence[Path], rendered: Path | None) -> str:
    """Measure the towers, write ``longer.json``, and return the tables."""
    paths = towers_by_steps(outputs)
    caches = open_caches(data)
    sets = open_sets(data / "all")
    if rendered:
        sets[RENDERED] = [Redrawn(sets["test"][0], rendered)]
    towers: dict[int, Towers] = {}
    for steps, of_steps in paths.items():
        towers[steps] = {}
        for path in of_steps:
            arm, _, seed = path.name.partition("-seed")
            rows = measure(path, sets, caches)
            towers[steps].setdefault(arm, {})[int(seed)] = rows
    any_seed = next(iter(next(iter(towers.values())).values()))
    tests = sorted(next(iter(any_seed.values())), key=lambda test: test != ENDPOINT)
    gains: list[Comparison] = []
    others: list[Comparison] = []
    for test in tests:
        of_steps, of_teachers = compare_all(test, towers)
        gains += of_steps
        others += of_teachers
    adjust(gains + others)
    longest = paths[max(paths)][0].parents[1]
    write_text(longest / "longer.json", json.dumps([*gains, *others], indent=2))
    tables = [gains_table(gains)]
    if others:
        tables.append(others_table(others))
    return "\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--outputs",
        type=Path,
        nargs="+",
        required=True,
        help="folders with towers/, each of one number of steps",
    )
    parser.add_argument("--rendered", type=Path, help="folder of drawings")
    print(make_report(**vars(parser.parse_args())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
