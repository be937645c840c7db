#!/usr/bin/env python3
"""Compare a quickstart's numbers with those that README.md and docs/benchmarks.md state, or record them there.

    scripts/check_claims.py quickstart-output/default                   exits with 1 if numbers moved
    scripts/check_claims.py quickstart-output/default --record          writes docs/claims*.json and the pages' tables
    scripts/check_claims.py quickstart-output/default --record llava    those of LLaVA alone; or towers

``docs/claims.json`` (towers) and ``docs/claims_llava.json`` hold, for each claim, the value of every seed on either
side. A method that is broken changes differences, so these are compared, in two ways, which fail for one
correct rerun in a hundred and one in fourteen.

Numbers: the difference of the two sides and the level of the first, each against the prediction interval of the mean of
so many more trainings, t * s * sqrt(1 / stated + 1 / new), s the pooled standard deviation over seeds (of the
difference seed by seed), at a level that all numbers share (Bonferroni). What involves no training may differ by
``ROUNDING``.

Gains: for each part (teacher, tower, each LLaVA) which fraction of its significant differences came back, their sum
weighted by difference over variance (half interval, squared). It has a lower bound alone, of the same form.

Exits with 1 if anything lies outside, or is missing. Prints Markdown tables.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from llm2clip_plugin.bootstrap import t_quantile
from llm2clip_plugin.contracts import ScoreFile, atomic_file

ROOT = Path(__file__).resolve().parents[1]
CLAIMS, CLAIMS_LLAVA = ROOT / "docs" / "claims.json", ROOT / "docs" / "claims_llava.json"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, BEGIN_LLAVA, END = (
    "<!-- scripts/claims.sh --record -->",
    "<!-- scripts/claims.sh --record: LLaVA -->",
    "<!-- end -->",
)
SIDES = {"raw": "raw LLM, read well", "tuned": "fine-tuned LLM"}
LLAVA_SIDES = {"before": "tower before stage 2", "after": "after"}
RAW_TUNED, BEFORE_AFTER = ("raw", "tuned"), ("before", "after")
LANGUAGE_MODELS = {"llava": "2.5 million weights", "llava-smollm2": "SmolLM2-135M"}  # folder -> language model
ROUNDING = 0.01
LEVEL = 0.05  # of the tests, after Holm's adjustment
NUMBERS_LEVEL, GAINS_LEVEL = 0.01, 0.07  # how often a correct rerun may fail for any of its numbers, and of its gains
NOT_RERUN = "Not rerun: the paper's LLaVA-1.5-7B results, which need GPUs."

Values = Mapping[str, Sequence[float]]  # side -> a value per seed


def measured(folder: Path) -> dict[str, Any]:
    """The claims of a quickstart's ``headline.json``. Raises FileNotFoundError without one."""
    path = folder / "headline.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; run scripts/quickstart.sh with both teachers, or name its output"
        )
    made = json.loads(path.read_text(encoding="utf-8"))
    first = [claim["name"] for claim in made["headline"]]
    return {
        claim["name"]: _claim(claim, headline=claim["name"] in first) for claim in made["headline"] + made["others"]
    }


def _claim(claim: Mapping[str, Any], *, headline: bool) -> dict[str, Any]:
    by_seed = claim["by_seed"].values()
    kept = ("measure", "chance", "difference", "interval", "p_adjusted", "significant", "seeds_significant")
    return {
        "headline": headline,
        **{name: claim[name] for name in kept},
        **{side: [round(seed[side], 5) for seed in by_seed] for side in SIDES},
    }


def measured_llava(folder: Path) -> dict[str, Any]:
    """The claims of the LLaVA miniatures in a quickstart's results, in percent; {} without one."""
    found = {}
    for name, model in LANGUAGE_MODELS.items():
        path = folder / name / "compare" / "compare.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []:
            about = row["benchmark"].removeprefix("miniature: ")
            found[f"{model}: {about}"] = {
                **{kept: row[kept] for kept in ("difference", "interval", "questions")},
                "p_adjusted": row["p_holm"],
                "significant": row["p_holm"] < LEVEL,
                **{side: _by_seed(folder / name / "scores" / side, row["benchmark"]) for side in LLAVA_SIDES},
            }
    return found


def _by_seed(folder: Path, benchmark: str) -> list[float]:
    """What each training reached, seed 0 first: accuracy, or points above exchanged pictures."""
    seed_0, *others = [folder, *sorted(folder.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))]
    scores = [ScoreFile.read(path) for one in (seed_0, *others) for path in sorted(one.glob("*.scores.json"))]
    return [
        round(score.metrics.get("above", score.metrics.get("accuracy", math.nan)), 2)
        for score in scores
        if score.benchmark == benchmark
    ]


def reach(stated: Sequence[float], new: Sequence[float], level: float = LEVEL, *, sides: int = 2) -> float:
    """Half of the prediction interval for the difference of two means over seeds; ``sides`` 1: of a lower bound."""
    samples = [side for side in (stated, new) if len(side) > 1]
    freedom = sum(len(side) - 1 for side in samples)
    if not freedom:
        raise ValueError("docs/claims.json holds one seed: no interval for another; record at least two")
    pooled = sum(variance(side) * (len(side) - 1) for side in samples) / freedom
    if pooled == 0:
        return ROUNDING
    return t_quantile(1 - level / sides, freedom) * math.sqrt(pooled * (1 / len(stated) + 1 / len(new)))


Sides = tuple[str, str]  # names of the base and of the new side


def differences(claim: Values, sides: Sides) -> list[float]:
    """New minus base, seed by seed."""
    return [new - base for base, new in zip(claim[sides[0]], claim[sides[1]], strict=True)]


def part_of(name: str) -> str:
    """``tower``, ``teacher``, or the language model of a LLaVA."""
    return name.partition(":")[0]


def gains(stated: Mapping[str, Any], values: Mapping[str, Values], sides: Sides) -> list[float]:
    """For each seed, which fraction of the significant differences in ``stated`` its values have."""
    weights = {
        name: claim["difference"] / ((claim["interval"][1] - claim["interval"][0]) / 2) ** 2
        for name, claim in stated.items()
        if claim["significant"]
    }
    whole = sum(weight * fmean(differences(stated[name], sides)) for name, weight in weights.items())
    by_claim = [[weight * one for one in differences(values[name], sides)] for name, weight in weights.items()]
    return [sum(of_seed) / whole for of_seed in zip(*by_claim, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One number of a rerun against what is stated."""

    part: str
    name: str
    stated: float
    now: float
    most: float  # that it may differ by
    below_only: bool = False

    @property
    def same(self) -> bool:
        """Whether it lies within its interval."""
        off = self.now - self.stated
        return (-off if self.below_only else abs(off)) <= self.most


def check(
    stated: Mapping[str, Any], new: Mapping[str, Values], sides: Sides, *, numbers: int, parts: int
) -> list[Checked]:
    """Every difference, level and gain of the claims that both have; ``numbers`` and ``parts`` share their levels."""
    found = []
    for name in (name for name in stated if name in new):
        old, now = stated[name], new[name]
        for what, before, after in (
            ("difference", differences(old, sides), differences(now, sides)),
            (sides[0], old[sides[0]], now[sides[0]]),
        ):
            most, what = reach(before, after, NUMBERS_LEVEL / numbers), f"{name}; {what}"
            found.append(Checked(part=part_of(name), name=what, stated=fmean(before), now=fmean(after), most=most))
    for part in dict.fromkeys(map(part_of, stated)):
        own = {name: claim for name, claim in stated.items() if part_of(name) == part and claim["significant"]}
        if own and own.keys() <= new.keys():
            before, after = gains(own, own, sides), gains(own, new, sides)
            most, what = reach(before, after, GAINS_LEVEL / parts, sides=1), f"{part}: fraction of the gains"
            found.append(Checked(part=part, name=what, stated=1.0, now=fmean(after), most=most, below_only=True))
    return found


def lines_of(checked: Sequence[Checked], shown: Callable[[float], str]) -> list[str]:
    """A Markdown table; ``shown`` writes a number of a claim."""
    lines = ["| number | stated | now | may differ by | |", "|---|---|---|---|---|"]
    for one in checked:
        write = number if one.below_only else shown
        verdict = "as stated" if one.same else "**moved**"
        lines.append(f"| {one.name} | {write(one.stated)} | {write(one.now)} | {write(one.most)} | {verdict} |")
        if one.below_only and one.most > 1:
            lines[-1] += f"\n| note: a {one.part} without any gain would pass; more seeds see it | | | | |"
    return lines


def table(claims: Mapping[str, Any]) -> list[str]:
    """README's table: a row per claim, the headline's first."""
    lines = [
        "| mean reciprocal rank, test families | raw LLM, read well | fine-tuned LLM | difference | alone | chance |",
        "|---|---|---|---|---|---|",
    ]
    for name, claim in sorted(claims.items(), key=lambda item: not item[1]["headline"]):
        low, high = claim["interval"]
        strong = "**" if claim["headline"] else ""
        lines.append(
            f"| {name} | {spread(claim['raw'])} | {strong}{spread(claim['tuned'])}{strong} "
            f"| {signed(claim['difference'])} [{signed(low)}, {signed(high)}] "
            f"| {claim['seeds_significant']} of {len(claim['tuned'])} | {number(claim['chance'])} |"
        )
    return lines


def full_table(claims: Mapping[str, Any]) -> list[str]:
    """The table of docs/benchmarks.md: as README's, with p."""
    count = max(len(claim["tuned"]) for claim in claims.values())
    lines = [
        f"| mean reciprocal rank | raw LLM, read well | fine-tuned LLM | chance | difference, {count} trainings "
        "| p (Holm) | significant alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, claim in sorted(claims.items(), key=lambda item: not item[1]["headline"]):
        low, high = claim["interval"]
        p = "< .001" if claim["p_adjusted"] < 0.001 else number(claim["p_adjusted"])
        lines.append(
            f"| {name} | {number(fmean(claim['raw']))} | {number(fmean(claim['tuned']))} | {number(claim['chance'])} "
            f"| {signed(claim['difference'])} [{signed(low)}, {signed(high)}] "
            f"| {p}{'' if claim['significant'] else ', not significant'} "
            f"| {claim['seeds_significant']} of {len(claim['tuned'])} |"
        )
    return lines


def llava_table(claims: Mapping[str, Any]) -> list[str]:
    """Both pages' table of the LLaVA miniatures: a row per claim."""
    lines = [
        "| language model: questions | trainings a side | tower before stage 2 | after | difference | p (Holm) "
        "| after, random embeddings |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, claim in claims.items():
        low, high = claim["interval"]
        p = "< .001" if claim["p_adjusted"] < 0.001 else number(claim["p_adjusted"])
        strong, shown = ("**", "") if claim["significant"] else ("", ", not shown")
        lines.append(
            f"| {name} ({claim['questions']}) | {len(claim['after'])} | {spread(claim['before'], percent)} "
            f"| {strong}{spread(claim['after'], percent)}{strong} "
            f"| {claim['difference']:+.1f} [{low:+.1f}, {high:+.1f}] | {p}{shown} "
            f"| {claim.get('control', 'not measured')} |"
        )
    return lines


def spread(values: Sequence[float], shown: Callable[[float], str] | None = None) -> str:
    """Mean ± standard deviation over seeds."""
    shown = shown or number
    deviation = stdev(values) if len(values) > 1 else 0.0
    return shown(fmean(values)) + (f" ± {shown(deviation)}" if deviation else "")


def percent(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def number(value: float) -> str:
    """Three decimals without the zero before them."""
    return f"{value:.3f}".removeprefix("0")


def signed(value: float) -> str:
    """As ``number``, with its sign."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def stated_table(page: Path, begin: str = BEGIN) -> list[str]:
    """The lines between a page's markers."""
    after = page.read_text(encoding="utf-8").split(begin + "\n", 1)[1]
    return after[: after.index(END)].strip().splitlines()


def record(claims: Mapping[str, Any]) -> None:
    """Write docs/claims.json and the tables between the markers of README.md and docs/benchmarks.md."""
    _record(CLAIMS, claims, BEGIN, {README: table(claims), BENCHMARKS: full_table(claims)})


def record_llava(claims: Mapping[str, Any]) -> None:
    """Write docs/claims_llava.json and the tables of LLaVA's miniatures; the control, which no run measures, stays."""
    known = json.loads(CLAIMS_LLAVA.read_text(encoding="utf-8")) if CLAIMS_LLAVA.is_file() else {}
    controls = {name: {"control": one["control"]} for name, one in known.items() if "control" in one}
    claims = {name: {**claim, **controls.get(name, {})} for name, claim in claims.items()}
    _record(CLAIMS_LLAVA, claims, BEGIN_LLAVA, dict.fromkeys((README, BENCHMARKS), llava_table(claims)))


def _record(path: Path, claims: Mapping[str, Any], begin: str, tables: Mapping[Path, Sequence[str]]) -> None:
    texts = {path: json.dumps(claims, indent=1, ensure_ascii=False) + "\n"}
    for page, lines in tables.items():
        before, rest = page.read_text(encoding="utf-8").split(begin + "\n")
        texts[page] = "\n".join([before + begin, *lines, rest[rest.index(END) :]])
    for written, text in texts.items():
        with atomic_file(written) as partial:
            partial.write_text(text, encoding="utf-8")


def check_all(folder: Path) -> tuple[list[Checked], list[str]]:
    """Print a table of towers and one of each LLaVA that was run; every number, and the names of missing claims."""
    runs = [(json.loads(CLAIMS.read_text(encoding="utf-8")), measured(folder), RAW_TUNED, number)]
    stated_llava, new_llava = json.loads(CLAIMS_LLAVA.read_text(encoding="utf-8")), measured_llava(folder)
    for name, model in LANGUAGE_MODELS.items():
        if (folder / name).is_dir():
            of_model = {claim: values for claim, values in stated_llava.items() if part_of(claim) == model}
            runs.append((of_model, new_llava, BEFORE_AFTER, percent))
        else:
            print(f"Not rerun: LLaVA with a language model of {model} ({folder / name} does not exist).\n")
    claims = [name for stated, *_ in runs for name in stated]
    levels = {"numbers": 2 * len(claims), "parts": len(set(map(part_of, claims)))}
    found: list[Checked] = []
    for stated, new, sides, shown in runs:
        checked = check(stated, new, sides, **levels)
        print("\n".join([*lines_of(checked, shown), ""]))
        found += checked
    print(NOT_RERUN)
    return found, [name for stated, new, *_ in runs for name in stated if name not in new]


def main() -> int:
    """Check or record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="a quickstart's results, e.g. quickstart-output/default")
    parser.add_argument(
        "--record",
        nargs="?",
        const="all",
        choices=("all", "towers", "llava"),
        help="write the numbers instead of comparing them",
    )
    args = parser.parse_args()
    if args.record in ("all", "towers"):
        record(new := measured(args.folder))
        print(f"wrote {len(new)} claims to docs/claims.json, README.md and docs/benchmarks.md")
    if args.record in ("all", "llava"):
        if not (new := measured_llava(args.folder)):
            raise FileNotFoundError(f"{args.folder} has no LLaVA; run scripts/quickstart.sh without --no-llava")
        record_llava(new)
        print(f"wrote {len(new)} claims to docs/claims_llava.json, README.md and docs/benchmarks.md")
    if args.record:
        return 0
    found, missing = check_all(args.folder)
    moved = [one.name for one in found if not one.same]
    for name in missing:
        print(f"missing: {name}", file=sys.stderr)
    print(f"{len(moved)} of {len(found)} numbers moved{': ' if moved else ''}{', '.join(moved)}", file=sys.stderr)
    return int(bool(moved or missing))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
