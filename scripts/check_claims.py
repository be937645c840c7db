#!/usr/bin/env python3
"""Compare a quickstart's numbers with those that README.md and docs/benchmarks.md state, or record
them there.

    scripts/check_claims.py quickstart-output/default   exits with 1 if numbers moved or are missing
    scripts/check_claims.py quickstart-output/default --record   writes docs/claims*.json, tables
    scripts/check_claims.py quickstart-output/default --record llava   LLaVA's alone; or towers
    scripts/check_claims.py quickstart-output/default --record map     only the linear map's columns

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

from llava_integration.evaluator.compare.multiplicity import holm
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.bootstrap import t_cdf, t_quantile
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.json_files import read_json_value as read_json
from llm2clip_plugin.report_text import (
    estimate,
    fraction,
    markdown_table,
    p_value,
    spread,
)

sys.path.append(str(Path(__file__).with_name("quickstart")))
from claims import claims_table, map_cells

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.json"
CLAIMS_LLAVA = ROOT / "docs" / "claims_llava.json"
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- scripts/claims.sh --record -->"
END = "<!-- end -->"
BEGIN_LLAVA = "<!-- scripts/claims.sh --record: LLaVA -->"
RAW_TUNED = ("raw", "tuned")
BEFORE_AFTER = ("before", "after")
# of LLaVA, by its folder
LANGUAGE_MODELS = {"llava": "2.5 million weights", "llava-smollm2": "SmolLM2-135M"}
# teacher of the tower -> its side in llava-controls
CONTROLS = {"random": "before", "raw": "after"}
ROUNDING = 0.01
LEVEL = 0.05  # of the tests, after Holm's adjustment
PERCENT = "{:.1f}".format
POINTS = "{:+.1f}".format
README_ROWS = {  # headline claim -> what README's table calls it
    "tower: names in languages of neither stage, caption → image": (
        "tower: name in another language → image"
    ),
    "teacher: names in languages of neither stage → English": (
        "LLM alone: name in another language → English name"
    ),
    "teacher: name → keywords without its words": (
        "LLM alone: English name → keywords that share no word with it"
    ),
}
# of a claim in headline.json, kept beside the values of its seeds
RECORDED_FIELDS = (
    "chance",
    "difference",
    "interval",
    "p_adjusted",
    "significant",
    "seeds_significant",
    "random",
    "map",
)
# how often a correct rerun may fail for any of its numbers, and of its gains
NUMBERS_LEVEL = 0.01
GAINS_LEVEL = 0.07

Sides = tuple[str, str]  # names of the base and of the new side
Values = Mapping[str, Sequence[float]]  # side -> a value per seed


def measured(folder: Path) -> dict[str, Any]:
    """The claims of a quickstart's ``headline.json``. Raises FileNotFoundError without one."""
    results = read_json(folder / "headline.json")
    claims = {}
    for result in results["headline"] + results["others"]:
        claim: dict[str, Any] = {"headline": result in results["headline"]}
        for field in RECORDED_FIELDS:
            if field in result:
                claim[field] = result[field]
        for side in RAW_TUNED:
            claim[side] = [round(seed[side], 5) for seed in result["by_seed"].values()]
        claims[result["name"]] = claim
    return claims


def measured_llava(folder: Path) -> dict[str, Any]:
    """The claims of the LLaVA miniature in a quickstart's results, in percent or points; {} without
    one."""
    claims = {}
    for model_folder, model in LANGUAGE_MODELS.items():
        scores = folder / model_folder / "scores"
        for benchmark, row in _compared(folder / model_folder).items():
            claim = dict(row)
            for side in BEFORE_AFTER:
                claim[side] = _by_seed(scores / side, benchmark)
            claim["controls"] = _controls(folder, model_folder, benchmark)
            claims[f"{model}: {benchmark.removeprefix('miniature: ')}"] = claim
    return claims


def _controls(
    folder: Path, model_folder: str, benchmark: str
) -> dict[str, dict[str, Any]]:
    """Control -> its values, and ``after`` compared with it; without those that were not run."""
    controls = {}
    for control, side in CONTROLS.items():
        row = _compared(folder / f"{model_folder}-{control}").get(benchmark)
        if row:
            scores = folder / f"{model_folder}-controls" / "scores" / side
            controls[control] = {"values": _by_seed(scores, benchmark), **row}
    return controls


def with_controls(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims, and each with a control in place of ``before``: the differences that tell about
    the teacher."""
    all_claims = dict(claims)
    for name, claim in claims.items():
        for control, row in claim["controls"].items():
            all_claims[f"{name} against {control}"] = {
                **claim,
                **row,
                "before": row["values"],
            }
    return all_claims


def _compared(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> what `llm2clip compare` found; {} where it was not run."""
    path = folder / "compare" / "compare.json"
    if not path.is_file():
        return {}
    return {
        row["benchmark"]: {
            "difference": row["difference"],
            "interval": row["interval"],
            "questions": row["questions"],
            "p_adjusted": row["p_holm"],
            "significant": row["p_holm"] < LEVEL,
        }
        for row in read_json(path)["rows"]
    }


def _by_seed(folder: Path, benchmark: str) -> list[float]:
    """What each training reached, seed 0 first: accuracy, or points above exchanged pictures."""

    def seed_order(path: Path) -> tuple[bool, int, Path]:
        """Seed 0 lies in the folder itself, the others in seed1, ..., seed10 below it."""
        return path.parent != folder, len(path.parent.name), path

    values = []
    for path in sorted(folder.rglob("*.scores.json"), key=seed_order):
        scores = ScoreFile.read(path)
        if scores.benchmark == benchmark:
            accuracy = scores.metrics.get("accuracy", math.nan)
            values.append(round(scores.metrics.get("above", accuracy), 2))
    return values


def reach(
    stated: Sequence[float],
    new: Sequence[float],
    level: float = LEVEL,
    *,
    sides: int = 2,
) -> float:
    """Half of the prediction interval for the difference of two means over seeds; ``sides`` 1: of a
    lower bound."""
    samples = [side for side in (stated, new) if len(side) > 1]
    freedom = sum(len(side) - 1 for side in samples)
    if not freedom:
        raise ValueError(
            "docs/claims.json holds one seed: no interval for another; record at least two"
        )
    pooled = sum(variance(side) * (len(side) - 1) for side in samples) / freedom
    if pooled == 0:
        return ROUNDING
    deviation = math.sqrt(pooled * (1 / len(stated) + 1 / len(new)))
    return t_quantile(1 - level / sides, freedom) * deviation


def differences(claim: Values, sides: Sides) -> list[float]:
    """New minus base, seed by seed."""
    return [
        new - base for base, new in zip(claim[sides[0]], claim[sides[1]], strict=True)
    ]


def part_of(name: str) -> str:
    """``tower``, ``teacher``, or LLaVA's language model."""
    return name.partition(":")[0]


def gains(
    stated: Mapping[str, Any], values: Mapping[str, Values], sides: Sides
) -> list[float]:
    """For each seed, which fraction of the differences in ``stated`` its values have."""
    weight_K = [
        claim["difference"] / np.ptp(claim["interval"]) ** 2
        for claim in stated.values()
    ]
    stated_KS = np.array([differences(stated[name], sides) for name in stated])
    new_KS = np.array([differences(values[name], sides) for name in stated])
    return (weight_K @ new_KS / (weight_K @ stated_KS).mean()).tolist()


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
    for name in stated:
        if name in new:
            checked += check_numbers(
                name, stated[name], new[name], sides, NUMBERS_LEVEL / numbers
            )
    for part in dict.fromkeys(map(part_of, stated)):
        significant = {
            name: claim
            for name, claim in stated.items()
            if part_of(name) == part and claim["significant"]
        }
        if significant and significant.keys() <= new.keys():
            checked.append(
                check_gains(part, significant, new, sides, GAINS_LEVEL / parts)
            )
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
    for side in (sides[0], "random"):
        if stated.get(side) and new.get(side):
            pairs[side] = (stated[side], new[side])
    if stated.get("map") and new.get("map"):
        pairs["linear map"] = (stated["map"]["values"], new["map"]["values"])
    format_number = fraction if sides == RAW_TUNED else PERCENT
    checked = []
    for number, (before, after) in pairs.items():
        old = fmean(before)
        now = fmean(after)
        most = reach(before, after, level)
        same = abs(now - old) <= most
        hidden = number == "difference" and stated["significant"] and most >= abs(old)
        checked.append(
            Checked(f"{name}; {number}", old, now, most, same, hidden, format_number)
        )
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
    stated_llava = read_json(CLAIMS_LLAVA)
    rerun = {
        model for name, model in LANGUAGE_MODELS.items() if (folder / name).is_dir()
    }
    stated_rerun = {
        name: claim for name, claim in stated_llava.items() if part_of(name) in rerun
    }
    llava = with_controls(measured_llava(folder))
    compared_llava = {
        name: claim
        for name, claim in with_controls(stated_rerun).items()
        if name in llava
        or name in stated_rerun  # a control that was not run is not missing
    }
    stated_towers = read_json(CLAIMS)
    towers = measured(folder)
    print_unchecked(folder, rerun, set(map(part_of, stated_llava)))
    claims = {**stated_towers, **compared_llava}
    numbers = sum(map(count_numbers, claims.values()))
    parts = len(set(map(part_of, claims)))
    checked: list[Checked] = []
    missing: list[str] = []
    for stated, new, sides in (
        (stated_towers, towers, RAW_TUNED),
        (compared_llava, llava, BEFORE_AFTER),
    ):
        rows = check(stated, new, sides, numbers=numbers, parts=parts)
        if rows:
            print(checked_table(rows))
        checked += rows
        missing += [name for name in stated if name not in new]
    return checked, missing


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
            hidden.append(
                f"{number.name} ({stated} ± {number.format_number(number.most)})"
            )
    if hidden:
        print(
            f"too few seeds to see the loss of {len(hidden)} differences: {', '.join(hidden)}; "
            "use more --seeds",
            file=sys.stderr,
        )


def table(claims: Mapping[str, Any]) -> str:
    """The table of towers and teachers, as the quickstart prints it."""
    rows = []
    for name, claim in claims.items():
        seeds = [
            dict(zip(RAW_TUNED, pair, strict=True))
            for pair in zip(claim["raw"], claim["tuned"], strict=True)
        ]
        rows.append({**claim, "name": name, "by_seed": dict(enumerate(seeds))})
    return claims_table(rows)


def readme_table(claims: Mapping[str, Any]) -> str:
    """README's table: a row per headline claim, in words that need no other page. The linear map
    has columns if a claim has it."""
    with_map = any(claim.get("map") for claim in claims.values())
    head = ["mean reciprocal rank (chance: .02)", "original LLM", "fine-tuned LLM"]
    head += ["fine-tuned minus original", "p"]
    if with_map:
        head.insert(2, "linear map")
        head.append("fine-tuned minus map")
    rows = []
    for name, claim in claims.items():
        strong = "**" if claim["significant"] else ""
        tuned = f"{strong}{spread(claim['tuned'])}{strong}"
        difference = estimate(claim["difference"], claim["interval"])
        p = p_value(claim["p_adjusted"])
        cells = [README_ROWS[name], spread(claim["raw"]), tuned, difference, p]
        if with_map:
            of_map, over_map = map_cells(claim.get("map"), len(claim["tuned"]))
            cells.insert(2, of_map)
            cells.append(over_map)
        rows.append(tuple(cells))
    return markdown_table(tuple(head), rows)


def llava_table(claims: Mapping[str, Any]) -> str:
    """The table of the LLaVA miniature: a row per claim."""
    head = (
        "language model: questions",
        "trainings a side",
        "tower before stage 2",
        "after",
        "difference",
        "p (Holm; seeds paired)",
        "random embeddings; after minus it",
        "raw LLM; after minus it",
    )
    paired = {side: paired_seeds(claims, side) for side in ("before", *CONTROLS)}
    rows = []
    for name, claim in claims.items():
        p_of = {side: p_of_claim[name] for side, p_of_claim in paired.items()}
        rows.append(llava_row(name, claim, p_of))
    return markdown_table(head, rows)


def llava_row(
    name: str, claim: Mapping[str, Any], paired_p: Mapping[str, float]
) -> tuple[str, ...]:
    """A claim's cells in ``llava_table``; ``paired_p``: of its seeds alone, against ``before`` and
    each control."""
    after = spread(claim["after"], PERCENT)
    p = p_value(claim["p_adjusted"])
    if claim["significant"]:
        after = f"**{after}**"
    else:
        p += ", not shown"
    cells = [
        f"{name} ({claim['questions']})",
        str(len(claim["after"])),
        spread(claim["before"], PERCENT),
        after,
        estimate(claim["difference"], claim["interval"], POINTS),
        f"{p} (paired {p_value(paired_p['before'])})",
    ]
    for side in CONTROLS:
        control = claim["controls"][side]
        values = spread(control["values"], PERCENT)
        difference = estimate(control["difference"], control["interval"], POINTS)
        p = f"{p_value(control['p_adjusted'])} (paired {p_value(paired_p[side])})"
        cells.append(f"{values}; {difference}, p {p}")
    return tuple(cells)


def paired_seeds(claims: Mapping[str, Any], side: str) -> dict[str, float]:
    """Claim -> p of ``after`` minus ``side`` (before or a control) by a paired t test over seeds,
    whose tower and batches both sides share, by Holm over the claims of its language model."""
    p_of: dict[str, float] = {}
    for model in dict.fromkeys(map(part_of, claims)):
        names = [name for name in claims if part_of(name) == model]
        values = []
        for name in names:
            claim = claims[name]
            base = (
                claim["before"]
                if side == "before"
                else claim["controls"][side]["values"]
            )
            values.append(paired_t(base, claim["after"]))
        p_of |= dict(zip(names, holm(values), strict=True))
    return p_of


def paired_t(base: Sequence[float], new: Sequence[float]) -> float:
    """Two-sided p of Student's paired t test; 1 for one pair."""
    difference_S = np.subtract(new, base)
    seeds = len(difference_S)
    if seeds < 2 or not difference_S.any():
        return 1.0
    error = float(np.std(difference_S, ddof=1)) / math.sqrt(seeds)
    if error == 0:
        return 0.0
    return 2 * (1 - t_cdf(abs(float(difference_S.mean())) / error, seeds - 1))


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
    has_controls = all(
        claim["controls"].keys() == CONTROLS.keys() for claim in llava.values()
    )
    if parts == "map":
        has_controls = any(claim.get("map") for claim in towers.values())
        towers = with_map(read_json(CLAIMS), towers)
    else:
        for name, claim in towers.items():
            if not claim.get("map") or (
                part_of(name) == "tower" and not claim.get("random")
            ):
                has_controls = False
    if not has_controls or not (llava or towers):
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
        help="a quickstart's results, e.g. quickstart-output/default",
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
    print(*(f"missing: {name}" for name in missing), summary, sep="\n", file=sys.stderr)
    return 1 if moved or missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
