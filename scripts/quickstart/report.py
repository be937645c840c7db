#!/usr/bin/env python3
"""The quickstart's report: every exported tower measured on data that training never saw, as tables.

    report.py --data quickstart-output/data --output quickstart-output/default
    report.py --data quickstart-output/data --teachers     prints the table of the teachers alone

Reads ``all/`` and the caches ``cache/raw/`` and ``cache/tuned-seed<n>/`` below ``--data``, and the towers
``towers/<teacher>-seed<n>/`` below ``--output``; writes ``headline.json`` there and prints the tables, the headline
last. A tower is measured with the cache of its name, and refused if its records name other shards, caches or adapters.
Seeds that are not finished are left out. ``--must-learn``: exit status 1 if a tower is no better than the control.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import scores
from scores import HEADLINE, TEACHERS, Claim, Rows, by_name, make_claims, pair_tests

from llm2clip_plugin.bootstrap import estimate, fraction, p_value, spread
from llm2clip_plugin.contracts import atomic_file


def table(head: Sequence[str], rows: Sequence[Sequence[str]], below: str) -> str:
    """Markdown; the first column names the row."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + f"\n\n{below}\n"


def claims_table(claims: Sequence[Claim], base: str = "raw") -> str:
    """A row per claim; those that are not significant say so. ``base``: of TEACHERS."""
    count, rows = len(claims[0]["by_seed"]), []
    for one in claims:
        sides = [fraction(one[side]) for side in ("raw", "tuned", "chance")]
        p = p_value(one["p_adjusted"]) + ", not significant" * (not one["significant"])
        alone = f"{one['seeds_significant']} of {count}"
        rows.append([one["name"], *sides, estimate(one["difference"], one["interval"]), p, alone])
    below = (
        "Mean reciprocal rank of the right answer: 1 if it is always first, .5 if always second. Difference: the same "
        f"queries on both sides, 95 % interval over families{' and seeds' * (count > 1)} ({count} "
        f"training{'s' * (count > 1)} a side); p of a paired test, adjusted for all {len(claims)} rows (Holm); alone: "
        "significant trainings, each by itself."
    )
    head = ["mean reciprocal rank", TEACHERS[base], TEACHERS["tuned"], "chance", "difference", "p", "alone"]
    return table(head, rows, below)


def retrieval_table(towers: Mapping[str, Rows]) -> str:
    """A row per test, a column per teacher."""
    groups, rows = by_name(towers), []
    for name, first in next(iter(towers.values())).items():
        cells = [spread([float(one[name].scores.mean()) for one in seeds.values()]) for seeds in groups.values()]
        rows.append([name, *cells, fraction(first.chance)])
    heads = [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]
    below = (
        "Mean reciprocal rank in galleries of one style each. Training saw no drawing of these families. ± is the "
        "standard deviation over seeds; equal scores are in random order."
    )
    return table(["tower", *heads, "chance"], rows, below)


def sentence(one: Claim) -> str:
    """A claim in words, with its interval and chance."""
    p, count = one["p_adjusted"], len(one["by_seed"])
    said = (
        f"{one['name']}: mean reciprocal rank {fraction(one['tuned'])} with the fine-tuned LLM, {fraction(one['raw'])} "
        f"with the raw LLM, read well, {fraction(one['chance'])} by chance; difference "
        f"{estimate(one['difference'], one['interval'])}, p {'' if p < 0.001 else '= '}{p_value(p)}; better for "
        f"{one['better']:.0%} of {one['queries']:,} queries, worse for {one['worse']:.0%}"
    )
    if count > 1:
        said += f"; significant in {one['seeds_significant']} of {count} seeds"
    return said + ("." if one["significant"] else ". This is NOT significant.")


def failures(towers: Mapping[str, Rows], claims: Sequence[Claim]) -> list[str]:
    """Requirements that a short run missed: towers above the control, a fine-tuned teacher above the raw one."""
    row = "test families, long captions, image → caption"
    mean = {name: fmean(of[row].scores.mean() for of in seeds.values()) for name, seeds in by_name(towers).items()}
    if "shuffled" not in mean:
        return ["no tower of the control, shuffled-seed0, to compare with; rerun scripts/quickstart.sh"]
    failed = [
        f"{TEACHERS[name]!r} reaches {value:.3f}, not above the control's {mean['shuffled']:.3f}"
        for name, value in mean.items()
        if name not in ("shuffled", "random") and value <= mean["shuffled"]
    ]
    return failed + [sentence(one) for one in claims if one["name"] == HEADLINE[2] and one["difference"] <= 0]


def make_report(data: Path, output: Path) -> tuple[list[str], list[str]]:
    """Measure the towers below ``output``, and write ``headline.json`` there.

    Returns what is printed (tables, those of claims last, and a sentence for each claim of the headline), and how a
    short run failed.
    """
    caches, sets = scores.open_caches(data), scores.open_sets(data / "all")
    folders = sorted(path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS)
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    inputs = {folder.name: scores.check_run(folder) for folder in folders}
    towers = {folder.name: scores.measure_tower(folder, sets, caches) for folder in folders}
    teachers = scores.measure_teachers(sets["test"][0], caches)
    claims = make_claims(pair_tests("tower", towers) | pair_tests("teacher", teachers))
    over = pair_tests("tower", towers, "plain")
    over_plain = make_claims(over | pair_tests("teacher", teachers, "plain") if over else {})
    headline = [one for one in claims if one["name"] in HEADLINE]
    sentences = [sentence(one) for one in headline]
    means = {name: {row: float(one.scores.mean()) for row, one in of.items()} for name, of in towers.items()}
    record = {"sentences": sentences, "headline": headline, "others": claims[len(headline) :]}  # significant or not
    record |= {"over_plain": over_plain, "towers": means, "inputs": inputs}
    with atomic_file(output / "headline.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
    tables = [claims_table(over_plain, "plain")] if over_plain else []
    tables += [claims_table(claims)] if claims else []
    return [retrieval_table(towers), *tables, *sentences], failures(towers, claims)


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument("--teachers", action="store_true", help="only print the table that needs no tower")
    parser.add_argument("--must-learn", action="store_true", help="fail if a tower is no better than the control")
    options = parser.parse_args()
    if options.teachers:
        captions = scores.open_sets(options.data / "all")["test"][0]
        teachers = scores.measure_teachers(captions, scores.open_caches(options.data))
        if claims := make_claims(pair_tests("teacher", teachers)):
            print("\n" + claims_table(claims))
        return
    told, failed = make_report(options.data, options.output)
    print("", *told, sep="\n")
    if options.must_learn and failed:
        raise ValueError("nothing was learned: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
