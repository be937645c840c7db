#!/usr/bin/env python3
"""The quickstart's report: every exported tower measured on data that training never saw, as tables and a page.

    report.py --data quickstart-output/data --output quickstart-output/default
    report.py --data quickstart-output/data --teachers     prints the table of the teachers alone

Reads ``all/`` and the caches ``cache/raw/`` and ``cache/tuned-seed<n>/`` below ``--data``, and the towers
``towers/<teacher>-seed<n>/`` below ``--output``; writes ``headline.json`` and ``index.html`` into ``--output`` and
prints the tables, the headline last. A tower is measured with the cache of its name, and refused if its records name
other shards, caches or adapters. Seeds that are not finished are left out. ``--must-learn``: exit status 1 if a tower
is no better than the control.
"""

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import scores
from scores import HEADLINE, TEACHERS, Claim, Tower, by_name, make_claims, tower_tests
from shards import in_random_order

from llava_integration.compare.statistics import Difference
from llm2clip_plugin.bootstrap import fraction, p_value, signed, spread
from llm2clip_plugin.console import render
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.sources import Source

PICTURES = 8  # on the page, per caption and tower


# ------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    title: str  # a question in plain words, on the page alone
    below: str  # caption below the table

    @property
    def markdown(self) -> str:
        """For the terminal."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{self.below}\n"


def interval(difference: Difference) -> str:
    """``+.069 [+.061, +.077]``."""
    return f"{signed(difference.difference)} [{signed(difference.low)}, {signed(difference.high)}]"


def claims_table(claims: Sequence[Claim], base: str, title: str) -> Table:
    """A row per claim; those that are not significant say so. ``base``: of TEACHERS."""
    rows = []
    for one in claims:
        sides = [one.difference.base, one.difference.new, one.chance]
        p = p_value(one.p) + ("" if one.significant else ", not significant")
        alone = f"{one.seeds_significant} of {len(one.by_seed)}"
        rows.append([one.name, *map(fraction, sides), interval(one.difference), p, alone])
    count = len(claims[0].by_seed)
    below = (
        "Mean reciprocal rank of the right answer: 1 if it is always first, .5 if always second. Difference: the same "
        f"queries on both sides, 95 % interval over families{' and seeds' * (count > 1)} ({count} "
        f"training{'s' * (count > 1)} a side); p of a paired test, adjusted for all {len(claims)} rows (Holm); alone: "
        "significant trainings, each by itself."
    )
    head = ["mean reciprocal rank", TEACHERS[base], TEACHERS["tuned"], "chance", "difference", "p", "alone"]
    return Table(head=head, rows=rows, below=below, title=title)


def retrieval_table(towers: Sequence[Tower]) -> Table:
    """A row per test, a column per teacher."""
    groups, rows = by_name(towers), []
    for name, first in towers[0].rows.items():
        cells = [spread([float(one.rows[name].scores.mean()) for one in seeds]) for seeds in groups.values()]
        rows.append([name, *cells, fraction(first.chance)])
    heads = [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]
    below = (
        "Mean reciprocal rank in galleries of one style each. Training saw no drawing of these families. ± is the "
        "standard deviation over seeds; equal scores are in random order."
    )
    return Table(head=["tower", *heads, "chance"], rows=rows, below=below, title="What does each tower find?")


# ------------------------------------------------------------------------------------------------- report


class Report(NamedTuple):
    """What is printed."""

    tables: list[Table]  # claims first, if there are both teachers
    sentences: list[str]  # one for each claim of the headline
    failures: list[str]  # of a short run


def failures(towers: Sequence[Tower], claims: Sequence[Claim]) -> list[str]:
    """Requirements that a short run missed: towers above the control, a fine-tuned teacher above the raw one."""
    row = "test families, long captions, image → caption"
    mean = {name: fmean(tower.rows[row].scores.mean() for tower in seeds) for name, seeds in by_name(towers).items()}
    if "shuffled" not in mean:
        return ["no tower of the control, shuffled-seed0, to compare with; rerun scripts/quickstart.sh"]
    failed = [
        f"{TEACHERS[name]!r} reaches {value:.3f}, not above the control's {mean['shuffled']:.3f}"
        for name, value in mean.items()
        if name not in ("shuffled", "random") and value <= mean["shuffled"]
    ]
    return failed + [sentence(one) for one in claims if one.name == HEADLINE[2] and one.difference.difference <= 0]


def sentence(one: Claim) -> str:
    """A claim in words, with its interval and chance."""
    change = one.difference
    p = f"p {p_value(one.p)}" if one.p < 0.001 else f"p = {p_value(one.p)}"
    said = (
        f"{one.name}: mean reciprocal rank {fraction(change.new)} with the fine-tuned LLM, {fraction(change.base)} "
        f"with the raw LLM, read well, {fraction(one.chance)} by chance; difference {interval(change)}, {p}; better "
        f"for {one.better:.0%} of {one.queries:,} queries, worse for {one.worse:.0%}"
    )
    if len(one.by_seed) > 1:
        said += f"; significant in {one.seeds_significant} of {len(one.by_seed)} seeds"
    return said + ("." if one.significant else ". This is NOT significant.")


def as_record(one: Claim) -> dict[str, Any]:
    """The claim for a JSON file."""
    kept = ("name", "chance", "queries", "better", "worse", "seeds_significant")
    by_seed = {str(seed): _numbers(one.by_seed[seed], one.p_by_seed[seed]) for seed in one.by_seed}
    return {**{name: getattr(one, name) for name in kept}, **_numbers(one.difference, one.p), "by_seed": by_seed}


def _numbers(difference: Difference, p: float) -> dict[str, Any]:
    return {
        "raw": difference.base,
        "tuned": difference.new,
        "difference": difference.difference,
        "interval": [difference.low, difference.high],
        "p": difference.p,
        "p_adjusted": p,
        "significant": bool(p < scores.LEVEL),
    }


# --------------------------------------------------------------------------------------------------- page


def page_queries(towers: Sequence[Tower], source: Source) -> list[dict[str, Any]]:
    """A long caption, a name, and a name in every other language, and the drawings that each tower ranks first.

    The captions are chosen by a hash: no result decides which are shown. Of a tower, its first seed; not the control.
    """
    shown = [seeds[0] for name, seeds in by_name(towers).items() if name != "shuffled"] or list(towers[:1])
    pairs = shown[0].pairs[0]  # the captions are the same for every tower
    owners, concepts = pairs.owner_M.tolist(), pairs.meta_values("concept")
    named = zip(pairs.captions, owners, strict=True)
    names = {concepts[owner]: c.text for c, owner in named if (c.kind, c.language) == ("short", "en")}
    order = {text: place for place, text in enumerate(in_random_order({c.text for c in pairs.captions}, "page"))}
    chosen: dict[tuple[str, str], int] = {}
    for number in sorted(range(len(pairs.captions)), key=lambda number: order[pairs.captions[number].text]):
        chosen.setdefault((pairs.captions[number].kind, pairs.captions[number].language), number)
    queries = []
    for kind, language in sorted(chosen, key=lambda key: (key[1] != "en", key)):
        query = chosen[kind, language]
        concept, found = concepts[owners[query]], {}
        for tower in shown:
            image_ND, text_MD = tower.pairs[0].image_ND, tower.pairs[0].text_MD
            found[TEACHERS[tower.name]] = [
                {
                    "base64": base64.b64encode(source[place].read_image()).decode(),
                    "title": f"{names[concepts[place]]} ({pairs.meta[place]['style']})",
                    "right": concepts[place] == concept,
                }
                for place in (image_ND @ text_MD[query]).topk(min(PICTURES, len(image_ND))).indices.tolist()
            ]
        meaning = "" if language == "en" else names[concept]
        queries.append({"text": pairs.captions[query].text, "language": language, "meaning": meaning, "found": found})
    return queries


# --------------------------------------------------------------------------------------------- assembly


def make_report(data: Path, output: Path, comparison: str = "") -> Report:
    """Measure the towers below ``output``; write ``headline.json`` and ``index.html`` there.

    ``comparison``: where the page's link to LLaVA's comparison points to; "" for none.
    """
    caches, sets = scores.open_caches(data), scores.open_sets(data / "all")
    folders = [path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS]
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    folders.sort(key=lambda path: (path.name.split("-")[0], scores.seed_of(path.name)))
    inputs = {folder.name: scores.check_run(folder) for folder in folders}
    towers = [scores.measure_tower(folder, sets, caches) for folder in folders]
    teachers = scores.measure_teachers(sets["test"][0], caches)
    over = tower_tests(towers, "plain")
    over |= scores.pair_tests("teacher", teachers, "plain") if over else {}
    claims = make_claims({**tower_tests(towers), **scores.pair_tests("teacher", teachers, "raw")})
    over_plain = make_claims(over)  # [] without that control
    tables = [claims_table(claims, "raw", "Is the fine-tuned LLM the better teacher?")] if claims else []
    tables += [claims_table(over_plain, "plain", "And against the raw LLM as it comes?")] if over_plain else []
    tables.append(retrieval_table(towers))
    sentences = [sentence(one) for one in claims if one.name in HEADLINE]
    record = {
        "sentences": sentences,
        "headline": [as_record(one) for one in claims if one.name in HEADLINE],
        "others": [as_record(one) for one in claims if one.name not in HEADLINE],  # whether significant or not
        "over_plain": [as_record(one) for one in over_plain],
        "towers": {
            f"{tower.name}-seed{tower.seed}": {row: float(one.scores.mean()) for row, one in tower.rows.items()}
            for tower in towers
        },
        "inputs": inputs,
    }
    page = render(
        Path(__file__).with_name("page.html"),
        headlines=sentences,
        tables=tables,
        queries=page_queries(towers, sets["test"][0]),
        comparison=comparison,
    )
    for name, text in (("headline.json", json.dumps(record, indent=2)), ("index.html", page)):
        with atomic_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return Report(tables, sentences, failures(towers, claims))


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument("--teachers", action="store_true", help="only print the table that needs no tower")
    parser.add_argument("--comparison", default="", help="page of LLaVA's comparison, relative to --output, to link to")
    parser.add_argument("--must-learn", action="store_true", help="fail if a tower is no better than the control")
    options = parser.parse_args()
    if options.teachers:
        captions = scores.open_sets(options.data / "all")["test"][0]
        teachers = scores.measure_teachers(captions, scores.open_caches(options.data))
        if claims := make_claims(scores.pair_tests("teacher", teachers, "raw")):
            print("\n" + claims_table(claims, "raw", "").markdown)
        return
    report = make_report(options.data, options.output, options.comparison)
    first, *others = report.tables
    print("\n" + "\n".join(table.markdown for table in [*others, first]))
    print("\n".join(report.sentences))
    if options.must_learn and report.failures:
        sys.exit("error: nothing was learned: " + "; ".join(report.failures))


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
