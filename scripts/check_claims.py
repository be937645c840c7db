#!/usr/bin/env python3
"""Compare a quickstart's numbers with those that README.md and docs/benchmarks.md state, or record
them there.

    scripts/check_claims.py quickstart-output/default                   exits with 1 if numbers moved or are missing
    scripts/check_claims.py quickstart-output/default --record          writes docs/claims*.json and the pages' tables
    scripts/check_claims.py quickstart-output/default --record llava    those of LLaVA alone; or towers

The files hold, for each claim, the value of every seed on either side. A broken method changes
differences, so these are compared, in two ways, which fail for one correct rerun in a hundred and
one in fourteen.

Numbers: the difference of the two sides and the level of the first, each against the prediction
interval of the mean of so many more trainings, t * s * sqrt(1 / stated + 1 / new), s the pooled
standard deviation over seeds (of the difference seed by seed), at a level that all share
(Bonferroni); ``ROUNDING`` for what involves no training.

Gains: for each part (teacher, tower, LLaVA) which fraction of its significant differences came
back, their sum weighted by difference over variance (half interval, squared). It has a lower bound
alone, of the same form.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NamedTuple

import numpy as np

from llm2clip_plugin.bootstrap import estimate, fraction, p_value, spread, t_quantile
from llm2clip_plugin.contracts import ScoreFile, write_text
from llm2clip_plugin.files import read_json_value as read_json
from llm2clip_plugin.vision.export import markdown_table

sys.path.append(str(Path(__file__).with_name("quickstart")))
from claims import claims_table

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
    "tower: names in languages never trained on, caption → image": "tower: name in another language → image",
    "teacher: names in languages never trained on → English": "LLM alone: name in another language → English name",
    "teacher: name → keywords without its words": "LLM alone: English name → keywords that share no word with it",
}
# how often a correct rerun may fail for any of its numbers, and of its gains
NUMBERS_LEVEL = 0.01
GAINS_LEVEL = 0.07

Sides = tuple[str, str]  # names of the base and of the new side
Values = Mapping[str, Sequence[float]]  # side -> a value per seed


def measured(folder: Path) -> dict[str, Any]:
    """The claims of a quickstart's ``headline.json``. Raises FileNotFoundError without one."""
    made = read_json(folder / "headline.json")
    kept = (
        "chance",
        "difference",
        "interval",
        "p_adjusted",
        "significant",
        "seeds_significant",
        "random",
    )
    return {
        claim["name"]: {
            "headline": claim in made["headline"],
            **{name: claim[name] for name in kept if name in claim},
        }
        | {side: [round(seed[side], 5) for seed in claim["by_seed"].values()] for side in RAW_TUNED}
        for claim in made["headline"] + made["others"]
    }


def measured_llava(folder: Path) -> dict[str, Any]:
    """The claims of the LLaVA miniature in a quickstart's results, in percent or points; {} without
    one."""
    found = {}
    for own, model in LANGUAGE_MODELS.items():
        for benchmark, row in _compared(folder / own).items():
            sides = {
                side: _by_seed(folder / own / "scores" / side, benchmark) for side in BEFORE_AFTER
            }
            controls = {
                one: {
                    "values": _by_seed(folder / f"{own}-controls" / "scores" / side, benchmark),
                    **compared,
                }
                for one, side in CONTROLS.items()
                if (compared := _compared(folder / f"{own}-{one}").get(benchmark))
            }
            found[f"{model}: {benchmark.removeprefix('miniature: ')}"] = {
                **row,
                **sides,
                "controls": controls,
            }
    return found


def with_controls(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims, and each with a control in place of ``before``: the differences that tell about
    the teacher."""
    return {**claims} | {
        f"{name} against {one}": {**claim, **control, "before": control["values"]}
        for name, claim in claims.items()
        for one, control in claim["controls"].items()
    }


def _compared(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> what `llm2clip compare` found; {} where it was not run."""
    path = folder / "compare" / "compare.json"
    return {
        row["benchmark"]: {kept: row[kept] for kept in ("difference", "interval", "questions")}
        | {"p_adjusted": row["p_holm"], "significant": row["p_holm"] < LEVEL}
        for row in (read_json(path)["rows"] if path.is_file() else [])
    }


def _by_seed(folder: Path, benchmark: str) -> list[float]:
    """What each training reached, seed 0 first: accuracy, or points above exchanged pictures."""
    paths = sorted(
        folder.rglob("*.scores.json"),
        key=lambda path: (path.parent != folder, len(path.parts[-2]), path),
    )
    scores = [ScoreFile.read(path) for path in paths]
    reached = [
        s.metrics.get("above", s.metrics.get("accuracy", math.nan))
        for s in scores
        if s.benchmark == benchmark
    ]
    return [round(value, 2) for value in reached]


def reach(
    stated: Sequence[float], new: Sequence[float], level: float = LEVEL, *, sides: int = 2
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
    return t_quantile(1 - level / sides, freedom) * math.sqrt(
        pooled * (1 / len(stated) + 1 / len(new))
    )


def differences(claim: Values, sides: Sides) -> list[float]:
    """New minus base, seed by seed."""
    return [new - base for base, new in zip(claim[sides[0]], claim[sides[1]], strict=True)]


def part_of(name: str) -> str:
    """``tower``, ``teacher``, or LLaVA's language model."""
    return name.partition(":")[0]


def gains(stated: Mapping[str, Any], values: Mapping[str, Values], sides: Sides) -> list[float]:
    """For each seed, which fraction of the differences in ``stated`` its values have."""
    weight_K = [claim["difference"] / np.ptp(claim["interval"]) ** 2 for claim in stated.values()]
    stated_KS, new_KS = (
        np.array([differences(of[name], sides) for name in stated]) for of in (stated, values)
    )
    return (weight_K @ new_KS / (weight_K @ stated_KS).mean()).tolist()


class Checked(NamedTuple):
    """One number of a rerun against what is stated."""

    name: str
    stated: float
    now: float
    most: float  # that it may differ by
    same: bool  # within its interval
    shown: Callable[[float], str] = fraction


def check(
    stated: Mapping[str, Any], new: Mapping[str, Values], sides: Sides, *, numbers: int, parts: int
) -> list[Checked]:
    """Every difference, level and gain of the claims that both have; ``numbers`` and ``parts``
    share their levels."""
    found: list[Checked] = []
    shown = fraction if sides == RAW_TUNED else PERCENT
    for name in filter(new.__contains__, stated):
        claims = stated[name], new[name]
        levels = {
            one: [of[one] for of in claims]
            for one in (sides[0], "random")
            if all(of.get(one) for of in claims)
        }
        for what, (before, after) in {
            "difference": [differences(of, sides) for of in claims],
            **levels,
        }.items():
            old = fmean(before)
            now = fmean(after)
            most = reach(before, after, NUMBERS_LEVEL / numbers)
            found.append(Checked(f"{name}; {what}", old, now, most, abs(now - old) <= most, shown))
    for part in dict.fromkeys(map(part_of, stated)):
        own = {
            name: claim
            for name, claim in stated.items()
            if part_of(name) == part and claim["significant"]
        }
        if own and own.keys() <= new.keys():
            before = gains(own, own, sides)
            after = gains(own, new, sides)
            now = fmean(after)
            most = reach(before, after, GAINS_LEVEL / parts, sides=1)
            found.append(
                Checked(f"{part}: fraction of the gains", 1.0, now, most, 1.0 - now <= most)
            )
    return found


def check_all(folder: Path) -> tuple[list[Checked], list[str]]:
    """Print a table of towers and one of what was run of LLaVA; every number, and the names of
    missing claims."""
    rerun = {model for own, model in LANGUAGE_MODELS.items() if (folder / own).is_dir()}
    of_llava = {
        name: claim for name, claim in read_json(CLAIMS_LLAVA).items() if part_of(name) in rerun
    }
    llava = with_controls(measured_llava(folder))
    ran = {
        name: claim
        for name, claim in with_controls(of_llava).items()
        if name in llava or name in of_llava
    }
    runs = [(read_json(CLAIMS), measured(folder), RAW_TUNED), (ran, llava, BEFORE_AFTER)]
    for own, model in LANGUAGE_MODELS.items():
        if model not in rerun:
            print(f"Not rerun: LLaVA with {model} ({folder / own} does not exist).\n")
        elif model not in map(part_of, of_llava):
            print(
                f"Not checked: LLaVA with {model}, of which {CLAIMS_LLAVA.name} states nothing.\n"
            )
    claims = {name: claim for stated, *_ in runs for name, claim in stated.items()}
    numbers = sum(2 + bool(one.get("random")) for one in claims.values())
    parts = len(set(map(part_of, claims)))
    found = list[Checked]()
    for run in runs:
        checked = check(*run, numbers=numbers, parts=parts)
        rows = [
            (one.name, *map(one.shown, one[1:4]), "as stated" if one.same else "**moved**")
            for one in checked
        ]
        if rows:
            print(markdown_table(("number", "stated", "now", "may differ by", "result"), rows))
        found += checked
    return found, [name for stated, new, _ in runs for name in stated if name not in new]


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
    """README's table: a row per headline claim, in words that need no other page."""
    rows = []
    for name, claim in claims.items():
        strong = "**" if claim["significant"] else ""
        tuned = f"{strong}{spread(claim['tuned'])}{strong}"
        difference = estimate(claim["difference"], claim["interval"])
        rows.append(
            (
                README_ROWS[name],
                spread(claim["raw"]),
                tuned,
                difference,
                p_value(claim["p_adjusted"]),
            )
        )
    head = (
        "mean reciprocal rank (chance: .02)",
        "original LLM",
        "fine-tuned LLM",
        "difference",
        "p",
    )
    return markdown_table(head, rows)


def llava_table(claims: Mapping[str, Any]) -> str:
    """The table of the LLaVA miniature: a row per claim."""
    head = (
        "language model: questions",
        "trainings a side",
        "tower before stage 2",
        "after",
        "difference",
        "p (Holm)",
    )
    rows = []
    for name, claim in claims.items():
        before, after = (spread(claim[side], PERCENT) for side in BEFORE_AFTER)
        strong = "**" * claim["significant"]
        cells = [
            f"{name} ({claim['questions']})",
            str(len(claim["after"])),
            before,
            f"{strong}{after}{strong}",
        ]
        p = p_value(claim["p_adjusted"]) + ", not shown" * (not claim["significant"])
        cells += [estimate(claim["difference"], claim["interval"], POINTS), p]
        for control in map(claim["controls"].__getitem__, CONTROLS):
            difference = estimate(control["difference"], control["interval"], POINTS)
            cells.append(
                f"{spread(control['values'], PERCENT)}; {difference}, p {p_value(control['p_adjusted'])}"
            )
        rows.append(tuple(cells))
    return markdown_table(
        (*head, "random embeddings; after minus it", "raw LLM; after minus it"), rows
    )


def record(path: Path, claims: Mapping[str, Any], begin: str, tables: Mapping[Path, str]) -> None:
    """Write the claims, and between the markers of each page its table."""
    for page, made in tables.items():
        before, rest = page.read_text(encoding="utf-8").split(begin + "\n")
        write_text(page, f"{before}{begin}\n{made}{rest[rest.index(END) :]}")
    write_text(path, json.dumps(claims, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {len(claims)} claims to {path.name} and the pages")


def headline(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims that were chosen before they were measured."""
    return {name: claim for name, claim in claims.items() if claim["headline"]}


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument(
        "folder", type=Path, help="a quickstart's results, e.g. quickstart-output/default"
    )
    parser.add_argument(
        "--record", nargs="?", const="all", choices=("all", "towers", "llava"), help="write instead"
    )
    args = parser.parse_args()
    if args.record:
        towers = {} if args.record == "llava" else measured(args.folder)
        llava = {} if args.record == "towers" else measured_llava(args.folder)
        whole = [
            bool(claim.get("random")) for name, claim in towers.items() if part_of(name) == "tower"
        ]
        whole += [claim["controls"].keys() == CONTROLS.keys() for claim in llava.values()]
        if not all(whole) or not (llava or args.record == "towers"):
            fix = "run scripts/quickstart.sh --controls, for LLaVA without --no-llava"
            raise FileNotFoundError(
                f"{args.folder} has not all controls of what is recorded; {fix}"
            )
        if towers:
            tables = {README: readme_table(headline(towers)), BENCHMARKS: table(towers)}
            record(CLAIMS, towers, BEGIN, tables)
        if llava:
            claims = read_json(CLAIMS_LLAVA) | llava  # the other model's stay
            record(CLAIMS_LLAVA, claims, BEGIN_LLAVA, {BENCHMARKS: llava_table(claims)})
        return 0
    found, missing = check_all(args.folder)
    moved = [one.name for one in found if not one.same]
    told = f"{len(moved)} of {len(found)} numbers moved{': ' if moved else ''}{', '.join(moved)}"
    print(*(f"missing: {name}" for name in missing), told, sep="\n", file=sys.stderr)
    return int(bool(moved or missing))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
