#!/usr/bin/env python3
"""The quickstart's report: every exported tower measured on data that training never saw, as tables and a page.

    report.py --data quickstart-output/data --output quickstart-output/default
    report.py --data quickstart-output/data --teachers     prints the tables of the teachers alone

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
from typing import Any

import scores
from scores import HEADLINE, TEACHERS, Claim, Tower, by_name, make_claims
from shards import in_random_order

from llava_integration.compare.statistics import Difference
from llm2clip_plugin.bootstrap import fraction, p_value, signed, spread
from llm2clip_plugin.console import render
from llm2clip_plugin.contracts import CacheManifest, atomic_file
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.retrieval import EmbeddedPairs

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
    for name, test in towers[0].tests.items():
        measured = [[tower.queries(*test) for tower in seeds] for seeds in groups.values()]
        cells = [spread([float(one.scores.mean()) for one in seeds]) for seeds in measured]
        rows.append([name, *cells, fraction(measured[0][0].chance)])
    heads = [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]
    below = (
        "Mean reciprocal rank in galleries of one style each. Training saw no drawing of these families. ± is the "
        "standard deviation over seeds; equal scores are in random order."
    )
    return Table(head=["tower", *heads, "chance"], rows=rows, below=below, title="What does each tower find?")


# ------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measurements."""

    towers: list[Tower]
    claims: list[Claim]  # the headline's first; [] without both teachers
    over_plain: list[Claim]  # the fine-tuned LLM against the raw one as it comes; [] without that control
    inputs: dict[str, dict[str, Any]]  # tower -> what its training read

    @property
    def sentences(self) -> list[str]:
        """One for each claim of the headline."""
        return [sentence(one) for one in self.claims if one.name in HEADLINE]

    @property
    def tables(self) -> list[Table]:
        """Claims and retrieval."""
        tables = [claims_table(self.claims, "raw", "Is the fine-tuned LLM the better teacher?")] if self.claims else []
        if self.over_plain:
            tables.append(claims_table(self.over_plain, "plain", "And against the raw LLM as it comes?"))
        return [*tables, retrieval_table(self.towers)]

    def as_json(self) -> dict[str, Any]:
        """The claims: the headline, and the others whether significant or not; every tower's MRR."""
        parts = {
            "headline": [one for one in self.claims if one.name in HEADLINE],
            "others": [one for one in self.claims if one.name not in HEADLINE],
            "over_plain": self.over_plain,
        }
        records = {name: [as_record(one) for one in part] for name, part in parts.items()}
        towers = {
            f"{tower.name}-seed{tower.seed}": {
                row: float(tower.queries(*t).scores.mean()) for row, t in tower.tests.items()
            }
            for tower in self.towers
        }
        return {"sentences": self.sentences, **records, "towers": towers, "inputs": self.inputs}

    def failures(self) -> list[str]:
        """Requirements that a short run missed: towers above the control, a fine-tuned teacher above the raw one."""
        failed = []
        mean = {
            name: fmean(tower.queries("test families, long captions", "i2t").scores.mean() for tower in seeds)
            for name, seeds in by_name(self.towers).items()
        }
        for name, value in mean.items():
            if name not in ("shuffled", "random") and value <= mean["shuffled"]:
                failed.append(f"{TEACHERS[name]!r} reaches {value:.3f}, not above the control's {mean['shuffled']:.3f}")
        lost = [one for one in self.claims if one.name == HEADLINE[2] and one.difference.difference <= 0]
        return [*failed, *map(sentence, lost)]


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


def choose_captions(pairs: EmbeddedPairs) -> list[int]:
    """A long caption, a name, and a name in every other language, by a hash: no result decides which are shown.

    Returns positions among the pairs' captions.
    """
    chosen: dict[tuple[str, str], int] = {}
    order = {text: place for place, text in enumerate(in_random_order({c.text for c in pairs.captions}, "page"))}
    for number in sorted(range(len(pairs.captions)), key=lambda number: order[pairs.captions[number].text]):
        chosen.setdefault((pairs.captions[number].kind, pairs.captions[number].language), number)
    return [chosen[key] for key in sorted(chosen, key=lambda key: (key[1] != "en", key))]


def best_pictures(pairs: EmbeddedPairs, source: Source, query: int) -> list[dict[str, Any]]:
    """The drawings that a tower ranks first for a caption: PNG in base 64, title, and whether it is of its concept."""
    concepts, names = pairs.meta_values("concept"), english_names(pairs)
    best = (pairs.image_ND @ pairs.text_MD[query]).topk(min(PICTURES, len(pairs.keys))).indices.tolist()
    return [
        {
            "base64": base64.b64encode(source[place].read_image()).decode(),
            "title": f"{names[concepts[place]]} ({pairs.meta[place]['style']})",
            "right": concepts[place] == concepts[pairs.owner_M[query]],
        }
        for place in best
    ]


def english_names(pairs: EmbeddedPairs) -> dict[str, str]:
    """Concept -> its English name."""
    concepts = pairs.meta_values("concept")
    named = zip(pairs.captions, pairs.owner_M.tolist(), strict=True)
    return {concepts[owner]: c.text for c, owner in named if (c.kind, c.language) == ("short", "en")}


def page_queries(towers: Sequence[Tower], source: Source) -> list[dict[str, Any]]:
    """The page's captions, and what the first seed of every tower except the control retrieves."""
    shown = [seeds[0] for name, seeds in by_name(towers).items() if name != "shuffled"] or list(towers[:1])
    pairs = shown[0].pairs  # the captions are the same for every tower
    concepts, names = pairs.meta_values("concept"), english_names(pairs)
    queries = []
    for query in choose_captions(pairs):
        caption, meaning = pairs.captions[query], names[concepts[pairs.owner_M[query]]]
        found = {TEACHERS[tower.name]: best_pictures(tower.pairs, source, query) for tower in shown}
        shown_meaning = "" if caption.language == "en" else meaning
        queries.append({"text": caption.text, "language": caption.language, "meaning": shown_meaning, "found": found})
    return queries


# --------------------------------------------------------------------------------------------- assembly


def open_caches(data: Path) -> dict[str, EmbeddingCache]:
    """Teacher -> cache below ``data``/cache, checked; incomplete caches are skipped with a message.

    Raises FileNotFoundError if no cache is complete.
    """
    caches: dict[str, EmbeddingCache] = {}
    for path in sorted((data / "cache").glob("*/")):
        manifest = path / CacheManifest.FILE
        if manifest.is_file() and CacheManifest.read(manifest).complete:
            caches[path.name] = EmbeddingCache.open(path)
        else:
            print(f"{path} is incomplete, skipped", file=sys.stderr)
    if not caches:
        raise FileNotFoundError(f"no complete embedding cache in {data / 'cache'}; run scripts/quickstart.sh")
    scores.check_caches(data, caches)
    return caches


def make_report(data: Path, output: Path, comparison: str = "") -> Report:
    """Measure the towers below ``output``; write ``headline.json`` and ``index.html`` there.

    ``comparison``: where the page's link to LLaVA's comparison points to; "" for none.
    """
    caches, sets = open_caches(data), scores.open_sets(data / "all")
    folders = [path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS]
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    folders.sort(key=lambda path: (path.name.split("-")[0], scores.seed_of(path.name)))
    inputs = {folder.name: scores.check_run(folder) for folder in folders}
    towers = [scores.measure_tower(folder, sets, caches) for folder in folders]
    captions, teachers = sets["test"][0], scores.teacher_rows(sets, caches)
    tests = {**scores.tower_tests(towers), **scores.teacher_tests(captions, teachers)}
    over = scores.tower_tests(towers, "plain")
    over |= scores.teacher_tests(captions, teachers, "plain") if over else {}
    report = Report(
        towers=towers,
        claims=make_claims(tests),
        over_plain=make_claims(over),
        inputs=inputs,
    )
    page = render(
        Path(__file__).with_name("page.html"),
        headlines=report.sentences,
        tables=report.tables,
        queries=page_queries(towers, sets["test"][0]),
        comparison=comparison,
    )
    for name, text in (("headline.json", json.dumps(report.as_json(), indent=2)), ("index.html", page)):
        with atomic_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return report


def first_result(data: Path) -> list[Table]:
    """The table that needs no tower: caption to caption, with both teachers."""
    sets, caches = scores.open_sets(data / "all"), open_caches(data)
    claims = make_claims(scores.teacher_tests(sets["test"][0], scores.teacher_rows(sets, caches)))
    return [claims_table(claims, "raw", "Is the fine-tuned LLM the better teacher?")] if claims else []


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument("--teachers", action="store_true", help="only print the tables that need no tower")
    parser.add_argument("--comparison", default="", help="page of LLaVA's comparison, relative to --output, to link to")
    parser.add_argument("--must-learn", action="store_true", help="fail if a tower is no better than the control")
    options = parser.parse_args()
    if options.teachers:
        print("\n" + "\n".join(table.markdown for table in first_result(options.data)))
        return
    report = make_report(options.data, options.output, options.comparison)
    first, *others = report.tables
    print("\n" + "\n".join(table.markdown for table in [*others, first]))
    print("\n".join(report.sentences))
    if options.must_learn and (failed := report.failures()):
        sys.exit("error: nothing was learned: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
