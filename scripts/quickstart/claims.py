#!/usr/bin/env python3
"""What the quickstart's towers and teachers show, and what they do not: paired tests, as tables and
headline.json.

    claims.py --data quickstart-output/data --output quickstart-output/default
    claims.py --data quickstart-output/data --teachers     prints the table of the teachers alone

Reads ``all/`` and ``cache/`` below ``--data`` and ``towers/<teacher>-seed<n>/`` below ``--output``;
writes ``headline.json`` there. Seeds that are not finished are left out. The measures are those of
measure.py.

The same queries are compared in pairs, as by ``llm2clip compare``; families of emoji are drawn as a
whole, because their members are right or wrong together, and p is adjusted for the number of claims
(Holm).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from measure import (
    TEACHERS,
    Measured,
    Rows,
    check_run,
    measure_teachers,
    measure_tower,
    open_caches,
    open_sets,
)

from llava_integration.evaluator.benchmarks.benchmark import mean_statistic
from llava_integration.evaluator.compare.statistics import compare, holm, pair
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.report_text import estimate, fraction, markdown_table, p_value, spread

# chosen before the seeds were run; the other claims are listed below them, significant or not
HEADLINE = (
    "tower: names in languages never trained on, caption → image",
    "teacher: names in languages never trained on → English",
    "teacher: name → keywords without its words",
)
LEVEL = 0.05  # of the test, after Holm's adjustment
LEGEND = (
    "Mean reciprocal rank of the right answer: 1 if it is always first, .5 if always second; "
    "equal scores are in\n"
    "random order. Training saw no drawing of these families. Galleries are of one style each. "
    "±: standard deviation over\n"
    "trainings. Difference: the same queries on both sides, 95 % interval over families and, "
    "if there are several, trainings.\n"
    "p: paired test, adjusted for all rows of its table (Holm); alone: significant trainings, "
    "each by itself.\n"
)

# test -> base and new side, by seed
Tests = dict[str, tuple[Mapping[int, Measured], Mapping[int, Measured]]]
# one test of two teachers on the same queries, over all seeds and for each; as in headline.json
Claim = dict[str, Any]


def by_name(rows: Mapping[str, Rows]) -> dict[str, dict[int, Rows]]:
    """Of TEACHERS, in its order -> those of its seeds in theirs, from ``NAME-seedN``."""
    groups: dict[str, dict[int, Rows]] = {name: {} for name in TEACHERS}
    for folder, of_folder in rows.items():
        name, _, seed = folder.partition("-seed")
        if seed and name in groups:
            groups[name][int(seed)] = of_folder
    return {name: dict(sorted(seeds.items())) for name, seeds in groups.items() if seeds}


def pair_tests(part: str, rows: Mapping[str, Rows], base: str = "raw") -> Tests:
    """The tests of ``base`` (of TEACHERS) and of the fine-tuned LLM by seed; {} without both.
    ``rows``: by ``NAME-seedN``; ``base`` alone stands for every seed: an LLM without an adapter has
    none."""
    groups = by_name(rows)
    new = groups.get("tuned", {})
    old = groups.get(base, {})
    if base in rows:
        old = dict.fromkeys(new, rows[base])
    if not old or not new:
        return {}
    tests: Tests = {}
    for name in next(iter(old.values())):
        old_runs = {seed: rows_of_seed[name] for seed, rows_of_seed in old.items()}
        new_runs = {seed: rows_of_seed[name] for seed, rows_of_seed in new.items()}
        tests[f"{part}: {name}"] = (old_runs, new_runs)
    return tests


def make_claims(tests: Tests) -> list[Claim]:
    """A claim for each test, the headline's first, on the seeds that all of them have; [] without
    one. With several seeds, the interval of their mean contains the spread over seeds; that of each
    seed does not."""
    seeds_of_sides = [set(side) for sides in tests.values() for side in sides]
    seeds = sorted(set.intersection(*seeds_of_sides)) if seeds_of_sides else []
    if not seeds:
        return []
    total = compare_tests(tests, seeds)
    alone = {str(seed): compare_tests(tests, [seed]) for seed in seeds}
    claims = []
    for number, (name, (base, new)) in enumerate(tests.items()):
        change = np.sign([new[seed].scores - base[seed].scores for seed in seeds])
        by_seed = {seed: of_seed[number] for seed, of_seed in alone.items()}
        claims.append(
            {
                "name": name,
                "chance": base[seeds[0]].chance,
                "queries": change.shape[1],
                # fractions of the queries, over all seeds, with a higher and a lower score
                "better": float(np.mean(change > 0)),
                "worse": float(np.mean(change < 0)),
                "seeds_significant": sum(result["significant"] for result in by_seed.values()),
                **total[number],
                "by_seed": by_seed,
            }
        )
    return sorted(claims, key=headline_place)


def headline_place(claim: Claim) -> int:
    """A claim's place in the headline; those that are not in it come last."""
    return HEADLINE.index(claim["name"]) if claim["name"] in HEADLINE else len(HEADLINE)


def compare_tests(tests: Tests, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The paired comparison of `llm2clip compare` on each test, p adjusted for all of them."""
    results = []
    for base, new in tests.values():
        base_runs = [mean_statistic(base[seed].scores.tolist(), scale=1.0) for seed in seeds]
        new_runs = [mean_statistic(new[seed].scores.tolist(), scale=1.0) for seed in seeds]
        paired = pair(base_runs, new_runs, base[seeds[0]].clusters)
        results.append(compare(paired, span=1.0))
    adjusted = holm([result.p for result in results])
    return [
        {
            "raw": result.base,
            "tuned": result.new,
            "difference": result.difference,
            "interval": [result.low, result.high],
            "p": result.p,
            "p_adjusted": p,
            "significant": bool(p < LEVEL),
        }
        for result, p in zip(results, adjusted, strict=True)
    ]


def claims_table(claims: Sequence[Claim], base: str = "raw") -> str:
    """A row per claim; those that are not significant say so. ``base``: of TEACHERS."""
    head = ("mean reciprocal rank, test families", TEACHERS[base], TEACHERS["tuned"])
    head += ("difference", "p (Holm)", "alone", "chance; random embeddings")
    return markdown_table(head, [claim_cells(claim) for claim in claims])


def claim_cells(claim: Claim) -> tuple[str, ...]:
    """The row of a claim."""
    by_seed = claim["by_seed"].values()
    raw = spread([result["raw"] for result in by_seed])
    tuned = spread([result["tuned"] for result in by_seed])
    if claim["significant"] and claim["name"] in HEADLINE:
        tuned = f"**{tuned}**"
    p = p_value(claim["p_adjusted"])
    if not claim["significant"]:
        p += ", not significant"
    alone = f"{claim['seeds_significant']} of {len(by_seed)}"
    chance = fraction(claim["chance"])
    if claim.get("random"):
        chance += f"; {spread(claim['random'])}"
    difference = estimate(claim["difference"], claim["interval"])
    return claim["name"], raw, tuned, difference, p, alone, chance


def mean_scores(seeds: Mapping[int, Rows], row: str) -> list[float]:
    """The mean score in a row, of each seed."""
    return [float(rows[row].scores.mean()) for rows in seeds.values()]


def retrieval_table(towers: Mapping[str, Rows]) -> str:
    """A row per test, a column per teacher."""
    groups = by_name(towers)
    heads = []
    for name, seeds in groups.items():
        count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        heads.append(f"{TEACHERS[name]} ({count})")
    rows = []
    first_tower = next(iter(towers.values()))
    for name, row in first_tower.items():
        cells = [spread(mean_scores(seeds, name)) for seeds in groups.values()]
        rows.append((name, *cells, fraction(row.chance)))
    head = ("mean reciprocal rank, tower", *heads, "chance")
    return markdown_table(head, rows)


def failures(towers: Mapping[str, Rows], claims: Sequence[Claim]) -> list[str]:
    """Requirements that a short run missed: towers above the control, a fine-tuned teacher above
    the raw one."""
    row = "test families, long captions, image → caption"
    reached: dict[str, float] = {}
    for name, seeds in by_name(towers).items():
        reached[name] = fmean(mean_scores(seeds, row))
    if "shuffled" not in reached:
        return [
            "no tower of the control, shuffled-seed0, to compare with; rerun scripts/quickstart.sh"
        ]
    control = reached["shuffled"]
    missed: list[str] = []
    for name, value in reached.items():
        if name not in ("shuffled", "random") and value <= control:
            missed.append(
                f"{TEACHERS[name]!r} reaches {value:.3f}, not above the control's {control:.3f}"
            )
    for claim in claims:
        if claim["name"] == HEADLINE[2] and claim["difference"] <= 0:
            missed.append(claims_table([claim]))
    return missed


def make_report(data: Path, output: Path) -> tuple[list[str], list[str]]:
    """Measure the towers below ``output``, and write ``headline.json`` there. Returns the tables
    that are printed, those of claims last, and how a short run failed."""
    caches = open_caches(data)
    sets = open_sets(data / "all")
    folders = sorted(
        path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS
    )
    if not folders:
        raise FileNotFoundError(
            f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh"
        )
    inputs = {folder.name: check_run(folder) for folder in folders}
    towers = {folder.name: measure_tower(folder, sets, caches) for folder in folders}
    teachers = measure_teachers(sets["test"][0], caches)
    claims = make_claims(pair_tests("tower", towers) | pair_tests("teacher", teachers))
    over_plain = []
    if tower_tests := pair_tests("tower", towers, "plain"):
        over_plain = make_claims(tower_tests | pair_tests("teacher", teachers, "plain"))
    headline = [claim for claim in claims if claim["name"] in HEADLINE]
    means: dict[str, dict[str, float]] = {}
    for name, rows in towers.items():
        means[name] = {row: float(measured.scores.mean()) for row, measured in rows.items()}
    add_random(claims, [rows for name, rows in means.items() if name.startswith("random-")])
    record = {
        "headline": headline,
        "others": claims[len(headline) :],  # significant or not
        "over_plain": over_plain,
        "table": claims_table(headline),
        "towers": means,
        "inputs": inputs,
    }
    write_text(output / "headline.json", json.dumps(record, indent=2))
    tables = [retrieval_table(towers)]
    if over_plain:
        tables.append(claims_table(over_plain, "plain"))
    if claims:
        tables.append(claims_table(claims))
    return [*tables, LEGEND], failures(towers, claims)


def add_random(claims: Sequence[Claim], random_towers: Sequence[Mapping[str, float]]) -> None:
    """Give each claim what the towers of random embeddings reach in its row, by seed; claims of
    teachers get []."""
    for claim in claims:
        row = claim["name"].removeprefix("tower: ")
        claim["random"] = [round(rows[row], 5) for rows in random_towers if row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument(
        "--teachers", action="store_true", help="only print the table that needs no tower"
    )
    parser.add_argument(
        "--must-learn", action="store_true", help="fail if a tower is no better than the control"
    )
    options = parser.parse_args()
    if options.teachers:
        captions = open_sets(options.data / "all")["test"][0]
        teachers = measure_teachers(captions, open_caches(options.data))
        if claims := make_claims(pair_tests("teacher", teachers)):
            print("", claims_table(claims), LEGEND, sep="\n")
        return
    tables, failed = make_report(options.data, options.output)
    print("", *tables, sep="\n")
    if options.must_learn and failed:
        raise ValueError("nothing was learned: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
