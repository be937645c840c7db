#!/usr/bin/env python3
"""What the quickstart's towers and teachers show, and what they do not: paired tests, as tables and
headline.json.

    claims.py --data quickstart-output/data --output quickstart-output/table
    claims.py --data quickstart-output/data --teachers     prints the table of the teachers alone

Reads ``all/`` and ``cache/`` below ``--data`` and ``towers/<teacher>-seed<n>/`` below ``--output``;
writes ``headline.json`` there. Seeds that are not finished are left out. The measures are those of
measure.py.

The same queries are compared in pairs, as by ``llm2clip compare``, and so are the trainings of one
seed; families of emoji are drawn as a whole, because their members are right or wrong together, and
p is adjusted for the number of claims (Holm).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from llava_integration.evaluator.compare.estimate import Estimate, combine
from llava_integration.evaluator.compare.multiplicity import holm
from llava_integration.evaluator.compare.statistics import (
    influences,
    over_clusters,
    pair,
    slips_of,
)
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.report_text import (
    estimate,
    fraction,
    markdown_table,
    p_value,
    spread,
)

# chosen before the seeds were run; the other claims are listed below them, significant or not
HEADLINE = (
    "tower: names in languages of neither stage, caption → image",
    "teacher: names in languages of neither stage → English",
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
    "Linear map: on the frozen raw LLM, fitted to the captions of stage 1. No stem in common: no "
    "word of the name begins\n"
    "with the same four letters as one of the keywords.\n"
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
    in_order = {}
    for name, seeds in groups.items():
        if seeds:
            in_order[name] = dict(sorted(seeds.items()))
    return in_order


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
    """A claim for each test, the headline's first, on the seeds that all tests of its part have;
    [] without one. With several seeds, the interval of their mean contains the spread over seeds;
    that of each seed does not."""
    seeds_of = shared_seeds(tests)
    tests = {name: sides for name, sides in tests.items() if seeds_of[name]}
    total = compare_tests(tests, seeds_of)
    all_seeds: set[int] = set()
    for name in tests:
        all_seeds.update(seeds_of[name])
    alone: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in sorted(all_seeds):
        with_seed = {
            name: sides for name, sides in tests.items() if seed in seeds_of[name]
        }
        alone[seed] = compare_tests(with_seed, {name: [seed] for name in with_seed})
    claims = []
    for name, (base, new) in tests.items():
        seeds = seeds_of[name]
        change_SQ = np.sign([new[seed].scores - base[seed].scores for seed in seeds])
        by_seed = {str(seed): alone[seed][name] for seed in seeds}
        significant = [result["significant"] for result in by_seed.values()]
        claim = {
            "name": name,
            "chance": base[seeds[0]].chance,
            "queries": change_SQ.shape[1],
            # fractions of the queries, over all seeds, with a higher and a lower score
            "better": float(np.mean(change_SQ > 0)),
            "worse": float(np.mean(change_SQ < 0)),
            "seeds_significant": sum(significant),
            **total[name],
            "by_seed": by_seed,
        }
        claims.append(claim)
    return sorted(claims, key=headline_place)


def shared_seeds(tests: Tests) -> dict[str, list[int]]:
    """Test -> the seeds that both sides of all tests of its part (teacher or tower) have."""
    shared: dict[str, set[int]] = {}
    for name, sides in tests.items():
        part = name.partition(":")[0]
        for side in sides:
            shared[part] = shared.get(part, set(side)) & set(side)
    return {name: sorted(shared[name.partition(":")[0]]) for name in tests}


def headline_place(claim: Claim) -> int:
    """A claim's place in the headline; those that are not in it come last."""
    return HEADLINE.index(claim["name"]) if claim["name"] in HEADLINE else len(HEADLINE)


def compare_tests(
    tests: Tests, seeds_of: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """New minus base in each test, p adjusted for all of them."""
    results = {}
    for name, (base, new) in tests.items():
        seeds = seeds_of[name]
        difference_SQ = [new[seed].scores - base[seed].scores for seed in seeds]
        estimate = compare_seeds(difference_SQ, base[seeds[0]].clusters)
        results[name] = {
            "raw": fmean(float(base[seed].scores.mean()) for seed in seeds),
            "tuned": fmean(float(new[seed].scores.mean()) for seed in seeds),
            "difference": float(np.mean(difference_SQ)),
            "interval": list(estimate.interval(1 - LEVEL)),
            "p": estimate.p(),
        }
    adjusted = holm([result["p"] for result in results.values()])
    for result, p in zip(results.values(), adjusted, strict=True):
        result["p_adjusted"] = p
        result["significant"] = bool(p < LEVEL)
    return results


def compare_seeds(difference_SQ: Sequence[np.ndarray], clusters: list[str]) -> Estimate:
    """The test of `llm2clip compare` for runs that are pairs: both sides of a seed have the same
    start and the same batches, so that what varies over seeds is their difference."""
    nothing = mean_statistic([0.0] * len(clusters), scale=1.0)
    runs = [
        mean_statistic(difference_Q.tolist(), scale=1.0)
        for difference_Q in difference_SQ
    ]
    paired = pair([nothing], runs, clusters)
    nothing_1C, run_SC = influences(paired)
    mean_S = np.mean(difference_SQ, axis=1)
    estimate = over_clusters(paired, float(mean_S.mean()), nothing_1C, run_SC, span=1.0)
    seeds = len(runs)
    if seeds == 1:
        return estimate
    # as compare: seeds differ by their slips, too, which the variance over clusters has already
    slips = slips_of(run_SC)
    between_seeds = max(float(np.var(mean_S, ddof=1)), slips)
    over_queries = max(0.0, estimate.error**2 - slips / seeds)
    of_seeds = (between_seeds / seeds, seeds - 1)
    of_queries = (over_queries, estimate.freedom)
    error, freedom = combine([of_seeds, of_queries])
    share = min(1.0, freedom / estimate.freedom)
    skew = estimate.skew * share**2
    return replace(estimate, error=error, freedom=freedom, skew=skew)


def claims_table(claims: Sequence[Claim], base: str = "raw") -> str:
    """A row per claim; those that are not significant say so. ``base``: of TEACHERS. The columns of
    the linear map are there if a claim has it."""
    with_map = any(claim.get("map") for claim in claims)
    head = ["mean reciprocal rank, test families", TEACHERS[base], TEACHERS["tuned"]]
    head += ["difference", "p (Holm)", "alone", "chance"]
    if with_map:
        head.insert(2, TEACHERS["map"])
        head.insert(6, "fine-tuned minus map")
    rows = [claim_cells(claim, with_map=with_map) for claim in claims]
    return markdown_table(tuple(head), rows)


def claim_cells(claim: Claim, *, with_map: bool) -> tuple[str, ...]:
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
    difference = estimate(claim["difference"], claim["interval"])
    cells = [claim["name"], raw, tuned, difference, p, alone, fraction(claim["chance"])]
    if with_map:
        of_map, over_map = map_cells(claim.get("map"), len(by_seed))
        cells.insert(2, of_map)
        cells.insert(6, over_map)
    return tuple(cells)


def map_cells(of_map: Mapping[str, Any] | None, seeds: int) -> tuple[str, str]:
    """What the map reaches in a claim's row, with its number of seeds if that is not ``seeds``; and
    the fine-tuned LLM minus the map on the same seeds."""
    if not of_map:
        return "not measured", ""
    reached = spread(of_map["values"])
    if len(of_map["values"]) != seeds:
        reached += f" ({len(of_map['values'])} seeds)"
    over_map = f"{estimate(of_map['difference'], of_map['interval'])}, "
    over_map += f"p {p_value(of_map['p_adjusted'])}"
    if not of_map["significant"]:
        over_map += ", not shown"
    return reached, over_map


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
    folders = []
    for path in sorted((output / "towers").glob("*-seed*")):
        if path.name.split("-")[0] in TEACHERS:
            folders.append(path)
    if not folders:
        raise FileNotFoundError(
            f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh"
        )
    inputs = {folder.name: check_run(folder) for folder in folders}
    towers = {folder.name: measure_tower(folder, sets, caches) for folder in folders}
    teachers = measure_teachers(sets["test"][0], caches)

    def tests_over(base: str) -> Tests:
        of_towers = pair_tests("tower", towers, base)
        return of_towers | pair_tests("teacher", teachers, base)

    claims = make_claims(tests_over("raw"))
    add_map(claims, tests_over("map"))
    over_plain = []
    if pair_tests("tower", towers, "plain"):
        over_plain = make_claims(tests_over("plain"))
    headline = [claim for claim in claims if claim["name"] in HEADLINE]
    means: dict[str, dict[str, float]] = {}
    for name, rows in towers.items():
        means[name] = {
            row: float(measured.scores.mean()) for row, measured in rows.items()
        }
    random_towers = [means[name] for name in means if name.startswith("random-")]
    add_random(claims, random_towers)
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


def add_map(claims: Sequence[Claim], tests: Tests) -> None:
    """Give each claim what the linear map reaches in its row, by seed, and the fine-tuned LLM minus
    the map on these seeds, if the row is in ``tests``."""
    over_map = {claim["name"]: claim for claim in make_claims(tests)}
    for claim in claims:
        row = over_map.get(claim["name"])
        if row:
            values = [round(seed["raw"], 5) for seed in row["by_seed"].values()]
            claim["map"] = {
                "values": values,
                "difference": row["difference"],
                "interval": row["interval"],
                "p_adjusted": row["p_adjusted"],
                "significant": row["significant"],
            }


def add_random(
    claims: Sequence[Claim], random_towers: Sequence[Mapping[str, float]]
) -> None:
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
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/table"))
    parser.add_argument(
        "--teachers",
        action="store_true",
        help="only print the table that needs no tower",
    )
    parser.add_argument(
        "--must-learn",
        action="store_true",
        help="fail if a tower is no better than the control",
    )
    options = parser.parse_args()
    if options.teachers:
        captions = open_sets(options.data / "all")["test"][0]
        teachers = measure_teachers(captions, open_caches(options.data))
        claims = make_claims(pair_tests("teacher", teachers))
        if claims:
            add_map(claims, pair_tests("teacher", teachers, "map"))
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
