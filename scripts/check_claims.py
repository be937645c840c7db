#!/usr/bin/env python3
"""Compare a quickstart's numbers with those that README.md and docs/benchmarks.md state, or record
them there.

    scripts/check_claims.py quickstart-output/table   exits with 1 if numbers moved or are missing
    scripts/check_claims.py quickstart-output/table --record   writes docs/claims*.json, tables
    scripts/check_claims.py quickstart-output/table --record llava   LLaVA's alone; or towers
    scripts/check_claims.py quickstart-output/table --record map     only the linear map's columns

The files hold, for each claim, the value of every seed on either side. A broken method changes
differences, so these are compared, in two ways, which fail for one correct rerun in a hundred and
one in fourteen.

Numbers: the difference of the two sides and the level of the first, each against the prediction
interval of the mean of so many more trainings, t * s * sqrt(1 / stated + 1 / new), s the pooled
standard deviation over seeds (of the difference seed by seed), at a level that all share
(Bonferroni); ``ROUNDING`` for what involves no training. Where a shown difference may be lost
within its interval, the table says so: more seeds are needed to see that.

Gains: for each part (teacher, tower, LLaVA) which fraction of its significant differences came
back, their sum weighted by difference over variance (half interval, squared). It has a lower bound
alone, of the same form.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NamedTuple

import numpy as np
from claims_measured import (
    BEFORE_AFTER,
    CONTROLS,
    LANGUAGE_MODELS,
    LEVEL,
    RAW_TUNED,
    by_part,
    measured,
    measured_llava,
    part_of,
    with_controls,
)
from claims_tables import PERCENT, llava_table, readme_table, table

from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.bootstrap import t_quantile
from llm2clip_plugin.json_files import read_json_value as read_json
from llm2clip_plugin.report_text import fraction, markdown_table

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.json"
CLAIMS_LLAVA = ROOT / "docs" / "claims_llava.json"
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- scripts/claims.sh --record -->"
END = "<!-- end -->"
BEGIN_LLAVA = "<!-- scripts/claims.sh --record: LLaVA -->"
ROUNDING = 0.01
# how often a correct rerun may fail for any of its numbers, and of its gains
NUMBERS_LEVEL = 0.01
GAINS_LEVEL = 0.07

Sides = tuple[str, str]  # names of the base and of the new side
Values = Mapping[str, Sequence[float]]  # side -> a value per seed


def reach(
    stated: Sequence[float],
    new: Sequence[float],
    level: float = LEVEL,
    *,
    sides: int = 2,
) -> float:
    """Half of the prediction interval for the difference of two means over seeds; ``sides`` 1: of a
    lower bound."""
    freedom = 0
    squares = 0.0  # of the deviations from the sides' means
    for side in (stated, new):
        if len(side) > 1:
            freedom += len(side) - 1
            squares += variance(side) * (len(side) - 1)
    if not freedom:
        raise ValueError(
            "docs/claims.json holds one seed: no interval for another; record at least two"
        )
    pooled_variance = squares / freedom
    if pooled_variance == 0:
        return ROUNDING
    deviation = math.sqrt(pooled_variance * (1 / len(stated) + 1 / len(new)))
    return t_quantile(1 - level / sides, freedom) * deviation


def differences(claim: Values, sides: Sides) -> list[float]:
    """New minus base, seed by seed."""
    base_side, new_side = sides
    seeds = zip(claim[base_side], claim[new_side], strict=True)
    return [new - base for base, new in seeds]


def gains(
    stated: Mapping[str, Any], values: Mapping[str, Values], sides: Sides
) -> list[float]:
    """For each seed, which fraction of the differences in ``stated`` its values have."""
    width_K = np.array([np.ptp(claim["interval"]) for claim in stated.values()])
    weight_K = [claim["difference"] for claim in stated.values()] / width_K**2
    stated_KS = np.array([differences(stated[name], sides) for name in stated])
    new_KS = np.array([differences(values[name], sides) for name in stated])
    stated_gain = (weight_K @ stated_KS).mean()
    return (weight_K @ new_KS / stated_gain).tolist()


class Checked(NamedTuple):
    """One number of a rerun against what is stated."""

    name: str
    stated: float
    now: float
    most: float  # that it may differ by
    same: bool  # within its interval
    hidden: bool = False  # a shown difference that could be lost within its interval
    format_number: Callable[[float], str] = fraction


def check(
    stated: Mapping[str, Any],
    new: Mapping[str, Values],
    sides: Sides,
    *,
    numbers: int,
    parts: int,
) -> list[Checked]:
    """Every difference, level and gain of the claims that both have; ``numbers`` and ``parts``
    share their levels."""
    checked: list[Checked] = []
    number_level = NUMBERS_LEVEL / numbers
    for name, claim in stated.items():
        if name in new:
            checked += check_numbers(name, claim, new[name], sides, number_level)
    gains_level = GAINS_LEVEL / parts
    for part, claims in by_part(stated).items():
        significant = {
            name: claim for name, claim in claims.items() if claim["significant"]
        }
        if significant and significant.keys() <= new.keys():
            checked.append(check_gains(part, significant, new, sides, gains_level))
    return checked


def check_numbers(
    name: str,
    stated: Mapping[str, Any],
    new: Mapping[str, Any],
    sides: Sides,
    level: float,
) -> list[Checked]:
    """The difference of a claim's sides, the level of its base and those of the controls."""
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "difference": (differences(stated, sides), differences(new, sides))
    }
    base_side, _ = sides
    for side in (base_side, "random"):
        if stated.get(side) and new.get(side):
            pairs[side] = (stated[side], new[side])
    if stated.get("map") and new.get("map"):
        pairs["linear map"] = (stated["map"]["values"], new["map"]["values"])
    checked = []
    for number, (before, after) in pairs.items():
        old = fmean(before)
        now = fmean(after)
        most = reach(before, after, level)
        is_shown = number == "difference" and stated["significant"]
        row = Checked(
            name=f"{name}; {number}",
            stated=old,
            now=now,
            most=most,
            same=abs(now - old) <= most,
            hidden=is_shown and most >= abs(old),
            format_number=fraction if sides == RAW_TUNED else PERCENT,
        )
        checked.append(row)
    return checked


def check_gains(
    part: str,
    significant: Mapping[str, Any],
    new: Mapping[str, Values],
    sides: Sides,
    level: float,
) -> Checked:
    """Which fraction of a part's significant differences came back."""
    before = gains(significant, significant, sides)
    after = gains(significant, new, sides)
    now = fmean(after)
    most = reach(before, after, level, sides=1)
    return Checked(f"{part}: fraction of the gains", 1.0, now, most, 1.0 - now <= most)


def check_all(folder: Path) -> tuple[list[Checked], list[str]]:
    """Print a table of towers and one of what was run of LLaVA; every number, and the names of
    missing claims."""
    all_stated_llava = read_json(CLAIMS_LLAVA)
    llava = with_controls(measured_llava(folder))
    rerun = {
        model for name, model in LANGUAGE_MODELS.items() if (folder / name).is_dir()
    }
    stated_llava = comparable_llava(all_stated_llava, rerun, llava)
    stated_towers = read_json(CLAIMS)
    towers = measured(folder)
    print_unchecked(folder, rerun, set(map(part_of, all_stated_llava)))
    claims = {**stated_towers, **stated_llava}
    numbers = sum(map(count_numbers, claims.values()))
    parts = len(by_part(claims))
    checked: list[Checked] = []
    missing: list[str] = []
    for stated, new, sides in (
        (stated_towers, towers, RAW_TUNED),
        (stated_llava, llava, BEFORE_AFTER),
    ):
        rows = check(stated, new, sides, numbers=numbers, parts=parts)
        if rows:
            print(checked_table(rows))
        checked += rows
        missing += [name for name in stated if name not in new]
    return checked, missing


def comparable_llava(
    stated: Mapping[str, Any], rerun: Collection[str], new: Collection[str]
) -> dict[str, Any]:
    """The stated claims of the language models that were rerun, and those of their controls that
    are in ``new``: a control that was not run is not missing."""
    of_rerun = {name: claim for name, claim in stated.items() if part_of(name) in rerun}
    comparable = {}
    for name, claim in with_controls(of_rerun).items():
        if name in of_rerun or name in new:
            comparable[name] = claim
    return comparable


def print_unchecked(
    folder: Path, rerun: Collection[str], stated: Collection[str]
) -> None:
    """A line for each language model of LLaVA that is not rerun, or of which nothing is stated."""
    for name, model in LANGUAGE_MODELS.items():
        if model not in rerun:
            print(f"Not rerun: LLaVA with {model} ({folder / name} does not exist).\n")
        elif model not in stated:
            print(
                f"Not checked: LLaVA with {model}, of which {CLAIMS_LLAVA.name} states nothing.\n"
            )


def count_numbers(claim: Mapping[str, Any]) -> int:
    """How many numbers of a claim may be compared: ``check_numbers``."""
    controls = [name for name in ("random", "map") if claim.get(name)]
    return 2 + len(controls)


def checked_table(checked: Sequence[Checked]) -> str:
    """A row per number that was compared."""
    rows = []
    for number in checked:
        values = map(number.format_number, (number.stated, number.now, number.most))
        result = "as stated" if number.same else "**moved**"
        if number.hidden and number.same:
            result += "; would not see that it is lost"
        rows.append((number.name, *values, result))
    return markdown_table(("number", "stated", "now", "may differ by", "result"), rows)


def print_hidden(checked: Sequence[Checked]) -> None:
    """A line that names the shown differences whose loss so few seeds would not see."""
    hidden = []
    for number in checked:
        if number.hidden:
            stated = number.format_number(number.stated)
            most = number.format_number(number.most)
            hidden.append(f"{number.name} ({stated} ± {most})")
    if hidden:
        print(
            f"too few seeds to see the loss of {len(hidden)} differences: {', '.join(hidden)}; "
            "use more --seeds",
            file=sys.stderr,
        )


def record(
    path: Path, claims: Mapping[str, Any], begin: str, tables: Mapping[Path, str]
) -> None:
    """Write the claims, and between the markers of each page its table."""
    for page, page_table in tables.items():
        before, rest = page.read_text(encoding="utf-8").split(begin + "\n")
        after = rest[rest.index(END) :]
        write_text(page, f"{before}{begin}\n{page_table}{after}")
    write_text(path, json.dumps(claims, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {len(claims)} claims to {path.name} and the pages")


def headline(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims that were chosen before they were measured."""
    return {name: claim for name, claim in claims.items() if claim["headline"]}


def record_all(folder: Path, parts: str) -> None:
    """Write the claims of ``parts`` (all, towers, map or llava). Raises FileNotFoundError if a
    control is missing."""
    towers = {} if parts == "llava" else measured(folder)
    llava = {} if parts in ("towers", "map") else measured_llava(folder)
    if parts == "map":
        is_complete = any(claim.get("map") for claim in towers.values())
        towers = with_map(read_json(CLAIMS), towers)
    else:
        is_complete = have_controls(towers, llava)
    if not is_complete or not (llava or towers):
        advice = "run scripts/quickstart.sh --controls, for LLaVA without --no-llava"
        raise FileNotFoundError(
            f"{folder} has not all controls of what is recorded; {advice}"
        )
    if towers:
        tables = {README: readme_table(headline(towers)), BENCHMARKS: table(towers)}
        record(CLAIMS, towers, BEGIN, tables)
    if llava:
        claims = read_json(CLAIMS_LLAVA) | llava  # the other model's stay
        record(CLAIMS_LLAVA, claims, BEGIN_LLAVA, {BENCHMARKS: llava_table(claims)})


def have_controls(towers: Mapping[str, Any], llava: Mapping[str, Any]) -> bool:
    """Whether every claim has the controls that the tables show."""
    for name, claim in towers.items():
        if not claim.get("map"):
            return False
        if part_of(name) == "tower" and not claim.get("random"):
            return False
    return all(claim["controls"].keys() == CONTROLS.keys() for claim in llava.values())


def with_map(stated: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The stated claims with the linear map of a run, which may have fewer seeds, and no towers."""
    claims = {}
    for name, claim in stated.items():
        claims[name] = dict(claim)
        if of_map := new.get(name, {}).get("map"):
            claims[name]["map"] = of_map
    return claims


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="a quickstart's results, e.g. quickstart-output/table",
    )
    parser.add_argument(
        "--record",
        nargs="?",
        const="all",
        choices=("all", "towers", "map", "llava"),
        help="write instead",
    )
    args = parser.parse_args()
    if args.record:
        record_all(args.folder, args.record)
        return 0
    checked, missing = check_all(args.folder)
    moved = [number.name for number in checked if not number.same]
    summary = f"{len(moved)} of {len(checked)} numbers moved"
    if moved:
        summary += f": {', '.join(moved)}"
    print_hidden(checked)
    for name in missing:
        print(f"missing: {name}", file=sys.stderr)
    print(summary, file=sys.stderr)
    return 1 if moved or missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
