#!/usr/bin/env python3
"""The quickstart's report: every exported tower measured on data that training never saw, as a table and a page.

    scripts/quickstart/report.py --data quickstart-output/data --output quickstart-output/default
    scripts/quickstart/report.py --data quickstart-output/data --teachers     prints the tables of the teachers alone

Reads ``all/`` and the caches ``cache/raw/`` and ``cache/tuned-seed<n>/`` below ``--data``, and the towers
``towers/<teacher>-seed<n>/`` below ``--output``; writes ``headline.json``, ``report.json`` and ``index.html`` into
``--output`` and prints the tables, the headline last; with ``--domain``, also those of Tux Paint's stamps. A tower is
measured with the cache of its name, and refused if its records name other shards, caches or adapters (inputs.py). Seeds
that are not finished are left out. ``--must-learn``: exit status 1 if a tower is no better than the control.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from charts import training_charts
from claims import Seeds, claims_table, make_claims
from domain import DomainReport, domain_report, has_domain, measure_domain, open_domain, same_kind_before
from embedding_map import draw_maps
from inputs import cache_of, check_caches, check_run
from page import Table, as_text, page_html
from pictures import page_duels, page_queries
from results import Report, as_headline, as_json, failures, in_order, top_1
from scores import (
    SIDES,
    open_captions,
    open_sets,
    read_teachers,
    seed_of,
    teacher_claims,
    tower_scores,
)
from tables import TEACHERS, Tower, by_name, teacher_table

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.contracts import CacheManifest, atomic_file
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.dual import LoadedDualEncoder

TEACHER_MAPS = {"raw": TEACHERS["raw"], "tuned-seed0": TEACHERS["tuned"]}  # caches whose names are drawn as a map


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


def open_tower(path: Path, caches: Mapping[str, EmbeddingCache]) -> tuple[LoadedDualEncoder, EmbeddingCache]:
    """A tower directory and the cache of its name. Raises ContractError if the tower's teacher is another."""
    dual = load_dual_encoder(path)
    return dual, cache_of(path, dual.card.teacher, caches)


def measure(path: Path, sets: dict[str, Source], caches: Mapping[str, EmbeddingCache]) -> Tower:
    """Load a tower directory and measure it. Raises ContractError if no cache belongs to its teacher."""
    dual, cache = open_tower(path, caches)
    images = ImageConfig.from_preprocessor(preprocessor_config(path))
    return Tower(name=path.name.split("-")[0], seed=seed_of(path.name), scores=tower_scores(dual, sets, cache, images))


def on_domain(folder: Path, start: Path, towers: Sequence[Path], caches: Mapping[str, EmbeddingCache]) -> DomainReport:
    """Measure the towers on the unseen domain in ``folder``; ``start``: the tower before training."""
    source = open_domain(folder)
    measured, pool = [], ""
    for path in towers:
        dual, cache = open_tower(path, caches)
        if not has_domain(cache):
            raise ContractError(f"{cache.directory} does not contain the captions of {source.path}; run llm2clip embed")
        measured.append(measure_domain(path, dual, cache, source))
        pool = dual.dual.config.pool
    complete = {name: cache for name, cache in caches.items() if has_domain(cache)}
    return domain_report(measured, same_kind_before(start, pool, source), source, complete)


# ------------------------------------------------------------------------------------------------ claims


def tower_claims(towers: Sequence[Tower], base: str = "raw") -> dict[str, tuple[Seeds, Seeds]]:
    """Test -> queries of the towers of the teacher ``base`` and of the fine-tuned one by seed; {} without both."""
    groups = by_name(towers)
    if base not in groups or "tuned" not in groups:
        return {}

    def queries(name: str, test: str, side: str) -> Seeds:
        return {tower.seed: tower.scores.queries(test, side) for tower in groups[name]}

    return {
        f"tower: {test}, {title}": (queries(base, test, side), queries("tuned", test, side))
        for test in towers[0].scores.tests()
        for side, title in SIDES.items()
    }


# --------------------------------------------------------------------------------------------- assembly


def make_report(
    data: Path,
    output: Path,
    notes: Sequence[str],
    comparison: str = "",
    domain: Path | None = None,
    start: Path = Path(),
) -> Report:
    """Measure the towers below ``output``; write ``headline.json``, ``report.json`` and ``index.html`` there.

    ``comparison``: where the page's link to LLaVA's comparison points to; "" for none. ``domain``: folder of the unseen
    domain's shard, with the tower before training, ``start``.
    """
    caches, sets = open_caches(data / "cache"), open_sets(data / "all")
    folders = [path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS]
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    ordered = sorted(folders, key=lambda path: (path.name.split("-")[0], seed_of(path.name)))
    check_caches(data, caches)
    inputs = {folder.name: check_run(folder) for folder in ordered}
    towers = [measure(folder, sets, caches) for folder in ordered]
    captions = open_captions(data / "all")
    teachers = read_teachers(captions, caches)
    tests = {**tower_claims(towers), **teacher_claims(captions, teachers)}
    over = tower_claims(towers, "plain")
    over |= teacher_claims(captions, teachers, base="plain") if over else {}
    paired = [path for path in ordered if path.name.split("-")[0] not in ("plain", "random")]
    report = Report(
        towers=towers,
        teachers=top_1(teachers),
        claims=in_order(make_claims(tests)) if any(name.startswith("tower") for name in tests) else [],
        over_plain=in_order(make_claims(over)),
        notes=[*notes],
        inputs=inputs,
        domain=on_domain(domain, start, paired, caches) if domain else None,
    )
    write(output / "headline.json", as_headline(report))
    write(output / "report.json", as_json(report))
    page = page_html(
        "LLM2CLIP quickstart",
        "A vision tower trained against an LLM's caption embeddings, on emoji drawn in three styles.",
        report.headlines,
        notes,
        report.tables,
        page_queries(towers, sets["test"]),
        duels=page_duels(towers, sets["test"]),
        maps=draw_maps(teachers, TEACHER_MAPS),
        charts=training_charts(data, output),
        sections=[report.domain.section] if report.domain else [],
        comparison=comparison,
    )
    write(output / "index.html", page)
    return report


def first_result(data: Path) -> list[Table]:
    """The tables that need no tower: caption to caption, with both teachers."""
    source = open_captions(data / "all")
    caches = open_caches(data / "cache")
    check_caches(data, caches)
    teachers = read_teachers(source, caches)
    claims = in_order(make_claims(teacher_claims(source, teachers)))
    return [teacher_table(top_1(teachers)), *([claims_table(claims, TEACHERS)] if claims else [])]


def write(path: Path, text: str) -> None:
    """The file appears whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--models", type=Path, default=Path("quickstart-output/models"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument("--teachers", action="store_true", help="only print the tables that need no tower")
    parser.add_argument("--comparison", default="", help="page of LLaVA's comparison, relative to --output, to link to")
    parser.add_argument("--note", action="append", default=[], help="also said on the page")
    parser.add_argument("--domain", type=Path, help="folder of Tux Paint's stamps as tuxpaint.py writes them")
    parser.add_argument("--must-learn", action="store_true", help="fail if a tower is no better than the control")
    options = parser.parse_args()
    try:
        if options.teachers:
            print("\n" + "\n".join(map(as_text, first_result(options.data))))
            return
        models = json.loads((options.models / "models.json").read_text(encoding="utf-8"))
        start = options.models / Path(models["tower"]).name
        notes = [*models["notes"], *options.note]
        report = make_report(options.data, options.output, notes, options.comparison, options.domain, start)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n" + "\n".join(map(as_text, [*report.tables[1:-1], report.tables[0]])))
    for note in report.notes:
        print(f"note: {note}")
    if report.domain:
        print("\n" + "\n".join(map(as_text, report.domain.tables)))
    print("\n".join(report.sentences))
    if options.must_learn and (failed := failures(report)):
        sys.exit("error: nothing was learned: " + "; ".join(failed))


if __name__ == "__main__":
    main()
