#!/usr/bin/env python3
"""The end of the quickstart: every exported tower measured on what training never saw, a table and a page.

    scripts/quickstart/report.py --output quickstart-output

Reads ``data/all``, ``cache/<teacher>`` and ``towers/<teacher>-seed<n>`` below ``--output``; writes ``report.json`` and
``index.html`` there and prints the table. A tower is measured with the cache of the teacher that its card names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page import Picture, Query, Table, as_text, cell, fraction, page_html
from scores import Pool, Score, image_features, read_pool, teacher_scores, tower_scores
from shards import in_random_order

from llm2clip_plugin.contracts import ContractError, TeacherIdentity, whole_file
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.evaluate.bootstrap import bootstrap_mean
from llm2clip_plugin.vision.dual import LoadedDualEncoder, load_dual_encoder
from llm2clip_plugin.vision.towers import preprocessor_config

TEACHERS = {  # part of a folder's name -> what the table calls it
    "raw": "LLM as it is",
    "tuned": "LLM fine-tuned",
    "shuffled": "control: wrong pictures",
}
TEST, LONG_CAPTIONS = "test", "test families, long captions"
PICTURES = 8  # of each caption
QUERIES = (("long", "en"), ("short", "en"))  # and a name in every other language


@dataclass(frozen=True, kw_only=True)
class Tower:
    """An exported tower and what was measured of it."""

    name: str  # raw | tuned | shuffled
    seed: int
    dual: LoadedDualEncoder
    cache: str  # folder's name
    scores: dict[str, Score]
    by_language: dict[str, Score]
    test_image_ND: torch.Tensor


def open_caches(folder: Path) -> dict[str, EmbeddingCache]:
    """Teacher -> cache. Raises FileNotFoundError if there is none."""
    caches = {path.name: EmbeddingCache.open(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    if not caches:
        raise FileNotFoundError(f"no embedding caches in {folder}; run scripts/quickstart.sh")
    return caches


def read_pools(data: Path, cache: EmbeddingCache) -> dict[str, Pool]:
    """The validation and test pools with one teacher's embeddings."""
    return {
        split: read_pool(open_source(SourceConfig(path=str(data / f"{split}-*.tar"))), cache)
        for split in ("validation", TEST)
    }


def measure(path: Path, pools: Mapping[str, dict[str, Pool]], fingerprints: Mapping[str, str]) -> Tower:
    """Load one tower directory and put it to every test. Raises ContractError if its teacher has no cache here."""
    name, seed = re.fullmatch(r"(\w+)-seed(\d+)", path.name).groups()
    dual = load_dual_encoder(path)
    fingerprint = TeacherIdentity(**dual.card.teacher).fingerprint
    if fingerprint not in fingerprints:
        raise ContractError(f"{path} was trained with teacher {fingerprint}; the caches are of {list(fingerprints)}")
    cache = fingerprints[fingerprint]
    images = ImageConfig.from_preprocessor(preprocessor_config(path))
    features = {split: image_features(dual, pool.source, images) for split, pool in pools[cache].items()}
    scores, by_language = tower_scores(dual, pools[cache], features)
    return Tower(
        name=name,
        seed=int(seed),
        dual=dual,
        cache=cache,
        scores=scores,
        by_language=by_language,
        test_image_ND=features[TEST],
    )


# ------------------------------------------------------------------------------------------------ tables


def by_name(towers: Sequence[Tower]) -> dict[str, list[Tower]]:
    """Name -> its seeds, in the order of ``TEACHERS``."""
    found = {name: [tower for tower in towers if tower.name == name] for name in TEACHERS}
    return {name: seeds for name, seeds in found.items() if seeds}


def retrieval_table(towers: Sequence[Tower]) -> Table:
    """Tests down, towers across; R@1 and R@10."""
    groups = by_name(towers)
    first = towers[0].scores
    rows = []
    for test, score in first.items():
        for side, title in (("i2t", "image → caption"), ("t2i", "caption → image")):
            row = [f"{test}, {title}"]
            for seeds in groups.values():
                row.append(" / ".join(cell([t.scores[test].metrics[f"{side}_r{k}"] for t in seeds]) for k in (1, 10)))
            row.append(f"{fraction(score.chance[f'{side}_r1'])} / {fraction(score.chance[f'{side}_r10'])}")
            rows.append(row)
    heads = [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]
    below = (
        f"R@1 / R@10 among {first[LONG_CAPTIONS].captions} test concepts; families of the test were never trained on; "
        "± is the deviation over seeds; ties count half."
    )
    return Table(head=["retrieval", *heads, "chance"], rows=rows, below=below)


def language_table(towers: Sequence[Tower]) -> Table:
    """Languages down, towers across: name -> image R@1 and R@10."""
    groups = by_name(towers)
    rows = [
        [
            language,
            *(
                " / ".join(cell([t.by_language[language].metrics[f"t2i_r{k}"] for t in seeds]) for k in (1, 10))
                for seeds in groups.values()
            ),
        ]
        for language in towers[0].by_language
    ]
    below = "Name → image on the test families, R@1 / R@10. The towers were trained on English captions alone."
    return Table(head=["language", *(TEACHERS[name] for name in groups)], rows=rows, below=below)


def teacher_table(teachers: Mapping[str, Mapping[str, float]]) -> Table:
    """The teachers alone, caption to caption."""
    tests = next(iter(teachers.values()))
    rows = [[test, *(fraction(teachers[name][test]) for name in teachers)] for test in tests]
    below = "Caption to caption, test families, top-1, no image: plain, and with the mean embedding taken off."
    return Table(head=["teacher", *(TEACHERS[name] for name in teachers)], rows=rows, below=below)


def gain(towers: Sequence[Tower]) -> str:
    """The fine-tuned teacher against the raw one on the same test images, with an interval over families."""
    groups = by_name(towers)
    if "raw" not in groups or "tuned" not in groups:
        return ""
    hits = {name: np.mean([t.scores[LONG_CAPTIONS].hits_N for t in groups[name]], axis=0) for name in ("raw", "tuned")}
    interval = bootstrap_mean(hits["tuned"] - hits["raw"], groups["raw"][0].scores[LONG_CAPTIONS].families_N)
    return (
        f"Fine-tuned minus raw teacher, {LONG_CAPTIONS}, image → caption R@1: {interval} (95 %, bootstrap by family)."
    )


# ------------------------------------------------------------------------------------------------- page


def choose_queries(pool: Pool) -> list[tuple[str, str, str, str]]:
    """(concept, kind, language, text), one concept each, in an order that no result decides."""
    wanted = [*QUERIES, *(("short", language) for language in pool.languages)]
    chosen, left = [], in_random_order(set(pool.concepts), "page")
    for kind, language in wanted:
        captions = pool.captions[kind, language]
        concept = next(concept for concept in left if concept in captions.concepts)
        left.remove(concept)
        chosen.append((concept, kind, language, captions.texts[captions.concepts.index(concept)]))
    return chosen


@torch.inference_mode()
def retrieve_pictures(tower: Tower, pool: Pool, concept: str, kind: str, language: str) -> list[Picture]:
    """The best pictures of a tower for a concept's caption."""
    captions = pool.captions[kind, language]
    query = captions.embedding_MW[captions.concepts.index(concept)]
    best = (tower.test_image_ND @ tower.dual.encode_text(query[None])[0]).topk(PICTURES).indices.tolist()
    names = pool.captions["short", "en"]
    return [
        Picture(
            png=pool.source.image(place),
            title=f"{names.texts[names.concepts.index(pool.concepts[place])]} ({pool.styles[place]})",
            right=pool.concepts[place] == concept,
        )
        for place in best
    ]


def page_queries(towers: Sequence[Tower], pools: Mapping[str, dict[str, Pool]]) -> list[Query]:
    """The page's captions with what the first seed of every tower but the control retrieves."""
    shown = [seeds[0] for name, seeds in by_name(towers).items() if name != "shuffled"] or list(towers[:1])
    pool = pools[shown[0].cache][TEST]
    names = pool.captions["short", "en"]
    return [
        Query(
            text=text,
            language=language,
            meaning="" if language == "en" else names.texts[names.concepts.index(concept)],
            found={
                TEACHERS[tower.name]: retrieve_pictures(tower, pools[tower.cache][TEST], concept, kind, language)
                for tower in shown
            },
        )
        for concept, kind, language, text in choose_queries(pool)
    ]


def as_json(towers: Sequence[Tower], teachers: Mapping[str, Mapping[str, float]], notes: Sequence[str]) -> str:
    """Every number, for machines."""
    body: dict[str, Any] = {"notes": list(notes), "teachers": teachers, "towers": defaultdict(dict)}
    for tower in towers:
        body["towers"][tower.name][f"seed{tower.seed}"] = {
            **{test: score.metrics for test, score in tower.scores.items()},
            "languages": {language: score.metrics for language, score in tower.by_language.items()},
        }
    body["chance"] = {test: score.chance for test, score in towers[0].scores.items()}
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def make_report(output: Path) -> tuple[list[Table], list[str]]:
    """Measure everything below ``output``; write ``report.json`` and ``index.html``; return tables and notes."""
    caches = open_caches(output / "cache")
    pools = {name: read_pools(output / "data" / "all", cache) for name, cache in caches.items()}
    folders = sorted(path for path in (output / "towers").iterdir() if re.fullmatch(r"\w+-seed\d+", path.name))
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    fingerprints = {cache.fingerprint: name for name, cache in caches.items()}
    towers = [measure(folder, pools, fingerprints) for folder in folders]
    teachers = {name: teacher_scores(pools[name][TEST]) for name in TEACHERS if name in pools}
    notes = json.loads((output / "models" / "models.json").read_text(encoding="utf-8"))["notes"]
    tables = [retrieval_table(towers), teacher_table(teachers), language_table(towers)]
    intro = "A vision tower trained against an LLM's caption embeddings, on emoji drawn in three styles. " + gain(
        towers
    )
    with whole_file(output / "report.json") as aside:
        aside.write_text(as_json(towers, teachers, notes), encoding="utf-8")
    with whole_file(output / "index.html") as aside:
        page = page_html("LLM2CLIP quickstart", intro, notes, tables, page_queries(towers, pools))
        aside.write_text(page, encoding="utf-8")
    return tables[:2], [*notes, *filter(None, [gain(towers)])]


def main() -> None:
    """Command line; see the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    options = parser.parse_args()
    try:
        tables, notes = make_report(options.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n" + "\n".join(map(as_text, tables)))
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
