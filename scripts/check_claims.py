#!/usr/bin/env python3
"""Compare a quickstart's numbers with those that README.md and docs/benchmarks.md state, or record them there.

    scripts/check_claims.py quickstart-output/default             exits with 1 if a number moved
    scripts/check_claims.py quickstart-output/default --record    writes docs/claims.json and both pages' tables

``docs/claims.json`` holds, for each claim, the value of every seed for either teacher. A number moved if the mean of
the new seeds lies outside the 95 % prediction interval for so many more trainings: t * s * sqrt(1 / stated + 1 / new),
s the pooled standard deviation over seeds. What involves no training (the LLM as it is, caption to caption) may differ
by ``ROUNDING``, for half precision on other machines. Prints a Markdown table.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from llm2clip_plugin.bootstrap import t_quantile
from llm2clip_plugin.contracts import atomic_file

ROOT = Path(__file__).resolve().parents[1]
CLAIMS, README, BENCHMARKS = ROOT / "docs" / "claims.json", ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- scripts/claims.sh --record -->", "<!-- end -->"
SIDES = {"raw": "LLM as it is", "tuned": "LLM fine-tuned"}
ROUNDING = 0.01
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


def reach(stated: Sequence[float], new: Sequence[float]) -> float:
    """Half of the prediction interval for the difference of two means over seeds."""
    samples = [side for side in (stated, new) if len(side) > 1]
    freedom = sum(len(side) - 1 for side in samples)
    if not freedom:
        raise ValueError("docs/claims.json holds one seed: no interval for another; record at least two")
    pooled = sum(variance(side) * (len(side) - 1) for side in samples) / freedom
    if pooled == 0:
        return ROUNDING
    return t_quantile(0.975, freedom) * math.sqrt(pooled * (1 / len(stated) + 1 / len(new)))


def check(stated: Mapping[str, Values], new: Mapping[str, Values]) -> tuple[list[str], int]:
    """Lines of a Markdown table, and how many numbers moved or are missing."""
    lines = ["| claim | teacher | stated | now | may differ by | |", "|---|---|---|---|---|---|"]
    moved = 0
    for name, claim in stated.items():
        for side, title in SIDES.items():
            old = claim[side]
            before = f"{number(fmean(old))} ({seeds(old)})"
            if name not in new:
                lines.append(f"| {name} | {title} | {before} | | | **missing** |")
                moved += 1
                continue
            now, most = new[name][side], reach(old, new[name][side])
            same = abs(fmean(now) - fmean(old)) <= most
            moved += not same
            verdict = "as stated" if same else "**moved**"
            after = f"{number(fmean(now))} ({seeds(now)})"
            lines.append(f"| {name} | {title} | {before} | {after} | {number(most)} | {verdict} |")
    return lines, moved


def table(claims: Mapping[str, Any]) -> list[str]:
    """README's table: a row per claim, the headline's first."""
    lines = [
        "| mean reciprocal rank, test families | LLM as it is | LLM fine-tuned | difference | alone | chance |",
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
        f"| mean reciprocal rank | LLM as it is | LLM fine-tuned | chance | difference, {count} trainings | p (Holm) "
        "| significant alone |",
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


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return number(fmean(values)) + (f" ± {number(deviation)}" if deviation else "")


def number(value: float) -> str:
    """Three decimals without the zero before them."""
    return f"{value:.3f}".removeprefix("0")


def signed(value: float) -> str:
    """As ``number``, with its sign."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def seeds(values: Sequence[float]) -> str:
    """``3 seeds``."""
    return f"{len(values)} seed{'s' * (len(values) > 1)}"


def stated_table(page: Path) -> list[str]:
    """The lines between a page's markers."""
    text = page.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def record(claims: Mapping[str, Any]) -> None:
    """Write docs/claims.json and the tables between the markers of README.md and docs/benchmarks.md."""
    texts = {CLAIMS: json.dumps(claims, indent=1, ensure_ascii=False) + "\n"}
    for page, lines in ((README, table(claims)), (BENCHMARKS, full_table(claims))):
        before, rest = page.read_text(encoding="utf-8").split(BEGIN + "\n")
        texts[page] = "\n".join([before + BEGIN, *lines, rest[rest.index(END) :]])
    for path, text in texts.items():
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")


def main() -> int:
    """Check or record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="a quickstart's results, e.g. quickstart-output/default")
    parser.add_argument("--record", action="store_true", help="write the numbers instead of comparing them")
    args = parser.parse_args()
    new = measured(args.folder)
    if args.record:
        record(new)
        print(f"wrote {len(new)} claims to docs/claims.json, README.md and docs/benchmarks.md")
        return 0
    lines, moved = check(json.loads(CLAIMS.read_text(encoding="utf-8")), new)
    print("\n".join([*lines, "", NOT_RERUN]))
    print(f"{moved} moved" if moved else "every number is within its interval", file=sys.stderr)
    return int(moved > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
