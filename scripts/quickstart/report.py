#!/usr/bin/env python3
"""The quickstart's report: every exported tower measured on data that training never saw, as a table and a page.

    scripts/quickstart/report.py --data quickstart-output/data --output quickstart-output/default

Reads ``all/`` and the caches ``cache/raw/`` and ``cache/tuned-seed<n>/`` below ``--data``, and the towers
``towers/<teacher>-seed<n>/`` below ``--output``; writes ``report.json`` and ``index.html`` into ``--output`` and
prints the table. A tower is measured with the cache of the teacher named in its card. ``--must-learn``: exit status 1
if a tower is no better than the control.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from page import Picture, Query, Table, as_text, cell, page_html
from scores import LONG_CAPTIONS, SIDES, TowerScores, open_sets, teacher_scores, tower_scores
from shards import in_random_order

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import CacheManifest, ContractError, TeacherIdentity, atomic_file
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.evaluate.embedded_pairs import EmbeddedPairs
from llm2clip_plugin.vision.preprocessor import preprocessor_config

TEACHERS = {  # part of a folder's name -> what the table calls it
    "raw": "LLM as it is",
    "tuned": "LLM fine-tuned",
    "shuffled": "control: wrong pictures",
}
PICTURES = 8  # per caption and tower


@dataclass(frozen=True, kw_only=True)
class Tower:
    """An exported tower and its measurements."""

    name: str  # raw | tuned | shuffled
    seed: int
    scores: TowerScores


def open_caches(folder: Path) -> dict[str, EmbeddingCache]:
    """Teacher -> cache; incomplete caches are skipped with a message.

    Raises FileNotFoundError if no cache is complete.
    """
    caches: dict[str, EmbeddingCache] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        manifest = path / CacheManifest.FILE
        if manifest.is_file() and CacheManifest.read(manifest).complete:
            caches[path.name] = EmbeddingCache.open(path)
        else:
            print(f"{path} is incomplete, skipped", file=sys.stderr)
    if not caches:
        raise FileNotFoundError(f"no complete embedding cache in {folder}; run scripts/quickstart.sh")
    return caches


def measure(path: Path, sets: dict[str, Source], caches: Mapping[str, EmbeddingCache]) -> Tower:
    """Load a tower directory and measure it. Raises ContractError if no cache belongs to its teacher."""
    name, _, seed = path.name.rpartition("-seed")
    dual = load_dual_encoder(path)
    fingerprint = TeacherIdentity(**dual.card.teacher).fingerprint
    cache = next((cache for cache in caches.values() if cache.fingerprint == fingerprint), None)
    if cache is None:
        known = {name: cache.fingerprint for name, cache in caches.items()}
        raise ContractError(f"{path} was trained with teacher {fingerprint}, but the caches belong to {known}")
    images = ImageConfig.from_preprocessor(preprocessor_config(path))
    return Tower(name=name, seed=int(seed), scores=tower_scores(dual, sets, cache, images))


# ------------------------------------------------------------------------------------------------ tables


def by_name(towers: Sequence[Tower]) -> dict[str, list[Tower]]:
    """Name -> towers of its seeds, in the order of ``TEACHERS``."""
    groups = {name: [tower for tower in towers if tower.name == name] for name in TEACHERS}
    return {name: seeds for name, seeds in groups.items() if seeds}


def heads(groups: Mapping[str, Sequence[Tower]]) -> list[str]:
    """Column names of the tables."""
    return [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]


def recalls(tests: Sequence[Mapping[str, float]], side: str) -> str:
    """``R@1 / R@10``, mean and deviation over seeds."""
    return " / ".join(cell([test[f"{side}_r{k}"] for test in tests]) for k in (1, 10))


def retrieval_table(towers: Sequence[Tower]) -> Table:
    """A row per test, a column per tower."""
    groups = by_name(towers)
    scores = {name: [tower.scores.tests() for tower in seeds] for name, seeds in groups.items()}
    rows = []
    for test, chance in towers[0].scores.tests(chance=True).items():
        for side, title in SIDES.items():
            cells = [recalls([tests[test] for tests in seeds], side) for seeds in scores.values()]
            rows.append([f"{test}, {title}", *cells, recalls([chance], side)])
    below = (
        "R@1 / R@10, mean over galleries of one style each. Training saw no drawing of these families. "
        "± is the standard deviation over seeds; ties count half."
    )
    return Table(head=["retrieval", *heads(groups), "chance"], rows=rows, below=below)


def language_table(towers: Sequence[Tower]) -> Table:
    """A row per language, a column per tower: retrieval of images by name."""
    groups = by_name(towers)
    rows = [
        [
            tag,
            *(
                recalls([tower.scores.part("test", "short", tag) for tower in seeds], "t2i")
                for seeds in groups.values()
            ),
        ]
        for tag in towers[0].scores.languages
    ]
    below = "Name → image on the test families, R@1 / R@10. The towers were trained on English captions only."
    return Table(head=["language", *heads(groups)], rows=rows, below=below)


def teacher_table(teachers: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """The teachers' caption-to-caption retrieval, without a tower."""
    tests = next(iter(teachers.values()))[0]
    rows = [[test, *(cell([scores[test] for scores in seeds]) for seeds in teachers.values())] for test in tests]
    below = (
        "Top-1 retrieval from caption to caption on the test families: plain, and with the mean embedding subtracted."
    )
    return Table(head=["teacher", *(TEACHERS[name] for name in teachers)], rows=rows, below=below)


def gain(towers: Sequence[Tower]) -> str:
    """Fine-tuned minus raw teacher on the same queries, by seed, with a bootstrap interval over families."""
    groups = by_name(towers)
    if "raw" not in groups or "tuned" not in groups:
        return ""
    gains = []
    for side, title in SIDES.items():
        each = {tower.seed: tower.scores.hits(side) for tower in groups["raw"]}
        paired = [tower.scores.hits(side)[0] - each[tower.seed][0] for tower in groups["tuned"] if tower.seed in each]
        if not paired:
            return ""
        interval = bootstrap_mean(np.mean(paired, axis=0), next(iter(each.values()))[1])
        seeds = ", ".join(f"{difference.mean():+.3f}" for difference in paired)
        gains.append(f"{title} {interval}" + (f" (by seed {seeds})" if len(paired) > 1 else ""))
    return (
        f"Fine-tuned minus raw teacher, {LONG_CAPTIONS}, R@1: {'; '.join(gains)}; 95 % interval, bootstrap by family."
    )


# ------------------------------------------------------------------------------------------------- page


def choose_queries(pairs: EmbeddedPairs) -> list[int]:
    """Captions for the page: a long one, a name, and a name in every other language, each of another concept.

    The order is a hash's, so no result decides which are shown. Returns positions among the pairs' captions.
    """
    concepts = pairs.meta_values("concept")
    place: dict[tuple[str, str, str], int] = {}
    for number, (caption, owner) in enumerate(zip(pairs.captions, pairs.owner_M.tolist(), strict=True)):
        place.setdefault((caption.kind, caption.language, concepts[owner]), number)
    languages = sorted({language for _, language, _ in place} - {"en"})
    order = in_random_order(set(concepts), "page")
    chosen, left = [], list(order)
    for kind, language in [("long", "en"), ("short", "en"), *(("short", language) for language in languages)]:
        left = left or list(order)  # fewer concepts than captions: start over
        concept = next(concept for concept in left if (kind, language, concept) in place)
        left.remove(concept)
        chosen.append(place[kind, language, concept])
    return chosen


def english_names(pairs: EmbeddedPairs) -> dict[str, str]:
    """Concept -> its English name."""
    concepts = pairs.meta_values("concept")
    named = zip(pairs.captions, pairs.owner_M.tolist(), strict=True)
    return {concepts[owner]: c.text for c, owner in named if (c.kind, c.language) == ("short", "en")}


def best_pictures(pairs: EmbeddedPairs, source: Source, query: int) -> list[Picture]:
    """The images that a tower ranks first for a caption."""
    concepts, names = pairs.meta_values("concept"), english_names(pairs)
    best = (pairs.image_ND @ pairs.text_MD[query]).topk(min(PICTURES, len(pairs.keys))).indices.tolist()
    return [
        Picture(
            png=source[place].read_image(),
            title=f"{names[concepts[place]]} ({pairs.meta[place]['style']})",
            right=concepts[place] == concepts[pairs.owner_M[query]],
        )
        for place in best
    ]


def page_queries(towers: Sequence[Tower], source: Source) -> list[Query]:
    """The page's captions, and what the first seed of every tower except the control retrieves."""
    shown = [seeds[0] for name, seeds in by_name(towers).items() if name != "shuffled"] or list(towers[:1])
    pairs = shown[0].scores.pairs  # the captions are the same for every tower
    concepts, names = pairs.meta_values("concept"), english_names(pairs)
    queries = []
    for query in choose_queries(pairs):
        caption, concept = pairs.captions[query], concepts[pairs.owner_M[query]]
        found = {TEACHERS[tower.name]: best_pictures(tower.scores.pairs, source, query) for tower in shown}
        meaning = "" if caption.language == "en" else names[concept]
        queries.append(Query(text=caption.text, language=caption.language, meaning=meaning, found=found))
    return queries


# --------------------------------------------------------------------------------------------- assembly


def as_json(
    towers: Sequence[Tower], teachers: Mapping[str, Sequence[Mapping[str, float]]], notes: Sequence[str]
) -> str:
    """Every number, as JSON."""
    body: dict[str, Any] = {"notes": list(notes), "teachers": teachers, "towers": defaultdict(dict)}
    for tower in towers:
        languages = {tag: tower.scores.part("test", "short", tag) for tag in tower.scores.languages}
        body["towers"][tower.name][f"seed{tower.seed}"] = {**tower.scores.tests(), "languages": languages}
    body["chance"] = towers[0].scores.tests(chance=True)
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measurements and notes on them."""

    towers: list[Tower]
    teachers: dict[str, list[dict[str, float]]]  # raw | tuned -> test -> score, of each adapter
    notes: list[str]

    @property
    def tables(self) -> list[Table]:
        """The tables for retrieval, teachers and languages."""
        return [retrieval_table(self.towers), teacher_table(self.teachers), language_table(self.towers)]


def make_report(data: Path, output: Path, notes: Sequence[str]) -> Report:
    """Measure the towers below ``output``; write ``report.json`` and ``index.html`` there."""
    caches, sets = open_caches(data / "cache"), open_sets(data / "all")
    folders = sorted(path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS)
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    towers = [measure(folder, sets, caches) for folder in folders]
    teachers = {
        name: [teacher_scores(sets["test"], cache) for folder, cache in caches.items() if folder.split("-")[0] == name]
        for name in TEACHERS
    }
    teachers = {name: seeds for name, seeds in teachers.items() if seeds}
    comparison = gain(towers)
    report = Report(towers=towers, teachers=teachers, notes=[*notes, *([comparison] if comparison else [])])
    intro = "A vision tower trained against an LLM's caption embeddings, on emoji drawn in three styles. " + comparison
    with atomic_file(output / "report.json") as temporary:
        temporary.write_text(as_json(towers, teachers, report.notes), encoding="utf-8")
    with atomic_file(output / "index.html") as temporary:
        page = page_html("LLM2CLIP quickstart", intro, notes, report.tables, page_queries(towers, sets["test"]))
        temporary.write_text(page, encoding="utf-8")
    return report


def failures(report: Report) -> list[str]:
    """Requirements that a short run missed: towers above the control, a fine-tuned teacher above the raw one."""
    failed = []
    recall = {
        name: np.mean([tower.scores.tests()[LONG_CAPTIONS]["i2t_r10"] for tower in seeds])
        for name, seeds in by_name(report.towers).items()
    }
    for name, value in recall.items():
        if name != "shuffled" and value <= recall["shuffled"]:
            failed.append(
                f"R@10 of {TEACHERS[name]!r} is {value:.3f}, not above the control's {recall['shuffled']:.3f}"
            )
    test = "name → keywords without its words, plain"
    top = {name: np.mean([scores[test] for scores in seeds]) for name, seeds in report.teachers.items()}
    if "tuned" in top and top["tuned"] <= top["raw"]:
        failed.append(f"{test}: fine-tuned {top['tuned']:.3f}, not above raw {top['raw']:.3f}")
    return failed


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--models", type=Path, default=Path("quickstart-output/models"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument("--must-learn", action="store_true", help="fail if a tower is no better than the control")
    options = parser.parse_args()
    try:
        notes = json.loads((options.models / "models.json").read_text(encoding="utf-8"))["notes"]
        report = make_report(options.data, options.output, notes)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n" + "\n".join(map(as_text, report.tables[:2])))
    for note in report.notes:
        print(f"note: {note}")
    if options.must_learn and (failed := failures(report)):
        sys.exit("error: nothing was learned: " + "; ".join(failed))


if __name__ == "__main__":
    main()
