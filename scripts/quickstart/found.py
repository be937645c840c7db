#!/usr/bin/env python3
"""What the quickstart's tower finds before and after stage 2: names asked in several languages,
recall, pictures.

    found.py --data quickstart-output/data-default --output quickstart-output/default

Reads ``towers/start-seedN`` (heads fitted, nothing else trained) and ``towers/tuned-seedN`` below
``--output``, and writes ``found.json`` there, which page.py and readme_picture.py show.

The queries are not chosen by looking: concepts of the test and languages are shuffled once, by a
fixed seed. Every query asks for the next concept by its name, every second one in English, the
others in the next language. Its answers are all drawings of one style, of which one is right.
Training saw no drawing of any of these families, and names in English alone.

For the picture in README.md, five of them are selected: going through the queries in that order,
the first five, each in another language, whose right picture is among the first ``SHOWN``. How many
had to be drawn for them is told.

Shapes: N images, D projection dimension.
"""

import argparse
import base64
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import (
    SETS,
    check_run,
    evaluate_tower,
    open_caches,
    open_sets,
    tower_galleries,
)

from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.retrieval import RetrievalReport

SIDES = {"before": "start", "after": "tuned"}
QUERIES = 24
SHOWN = 5  # pictures of each query and side
FIGURE = 5  # queries of the picture in README.md
KS = (1, 10)
RECALL = {  # set and kind of caption -> what it is
    ("test", "short"): "names in English",
    ("test", "other"): "names in languages that training never saw",
    ("test", "long"): "descriptions in English",
    ("unseen style", "long"): (
        "descriptions, drawings in a style that training never saw"
    ),
}
LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "pl": "Polish",
    "tr": "Turkish",
    "ru": "Russian",
    "zh": "Chinese",
    "ja": "Japanese",
    "ar": "Arabic",
    "hi": "Hindi",
    "vi": "Vietnamese",
}

Reports = Mapping[str, Sequence[RetrievalReport]]  # set -> of each style


def draw(
    concepts: Sequence[str], languages: Sequence[str]
) -> list[tuple[str, str, int]]:
    """All queries in order: (concept, language, number of the style), the same at every call."""
    generator = random.Random(0)
    shuffled = generator.sample(sorted(concepts), len(concepts))
    in_order = generator.sample(sorted(languages), len(languages))
    others = [language for language in in_order if language != "en"]
    styles = len(SETS["test"])
    queries = []
    for number, concept in enumerate(shuffled):
        is_english = number % 2 == 0 or not others
        language = "en" if is_english else others[number // 2 % len(others)]
        queries.append((concept, language, number % styles))
    return queries


def recall(reports: Reports) -> list[dict[str, Any]]:
    """For each row of RECALL: how often the right picture is among the first k, in percent."""
    rows = []
    for (set_name, kind), title in RECALL.items():
        if set_name not in reports:
            continue
        galleries = tower_galleries(reports[set_name], kind, "t2i")
        shares = {}
        queries = 0
        for k in KS:
            hit_Q = torch.cat([ranks.hits(k) for ranks, _, _ in galleries])
            queries = len(hit_Q)
            shares[f"first {k}"] = 100 * float(hit_Q.mean())
        _, _, images = galleries[0]
        rows.append({"title": title, "queries": queries, "images": images, **shares})
    return rows


def search(pairs: EmbeddedPairs, concept: str, language: str) -> dict[str, Any]:
    """Ask for a concept by its name in a language: the text, the rank of its picture, the concepts
    found first."""
    concepts = [meta["concept"] for meta in pairs.meta]
    right = concepts.index(concept)
    names = []
    for number, caption in enumerate(pairs.captions):
        is_name = (caption.kind, caption.language) == ("short", language)
        if is_name and int(pairs.owner_M[number]) == right:
            names.append(number)
    (name,) = names
    image_ND = torch.nn.functional.normalize(pairs.image_ND, dim=1)
    text_D = torch.nn.functional.normalize(pairs.text_MD[name], dim=0)
    score_N = image_ND @ text_D
    order = score_N.argsort(descending=True, stable=True).tolist()
    return {
        "text": pairs.captions[name].text,
        "rank": order.index(right) + 1,
        "first": [concepts[image] for image in order[:SHOWN]],
    }


def pictures(source: Source, concepts: set[str]) -> dict[str, str]:
    """Concept -> its drawing, as a data URI."""
    uris = {}
    for number in range(len(source)):
        sample = source[number]
        concept = sample.meta["concept"]
        if concept in concepts:
            encoded = base64.b64encode(sample.read_image()).decode()
            uris[concept] = f"data:image/png;base64,{encoded}"
    return uris


def english_names(pairs: EmbeddedPairs) -> dict[str, str]:
    """Concept -> its name."""
    names = {}
    for caption, owner in zip(pairs.captions, pairs.owner_M.tolist(), strict=True):
        if (caption.kind, caption.language) == ("short", "en"):
            names[pairs.meta[owner]["concept"]] = caption.text
    return names


def ask(
    reports: Mapping[str, Reports], concept: str, language: str, style: int
) -> dict[str, Any]:
    """What both towers answer to a query."""
    sides = {}
    text = ""
    for side, of_side in reports.items():
        sides[side] = search(of_side["test"][style].pairs, concept, language)
        text = sides[side].pop("text")  # the same on both sides
    return {
        "text": text,
        "language": LANGUAGES.get(language, language),
        "code": language,
        "style": SETS["test"][style],
        "concept": concept,
        **sides,
    }


def is_found(query: Mapping[str, Any]) -> bool:
    """Whether the right picture is among those that are shown."""
    return query["after"]["rank"] <= SHOWN


def select(queries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Those of README.md's picture, how many were drawn for them, and how many of these found their
    picture."""
    selected: list[dict[str, Any]] = []
    languages: set[str] = set()
    drawn = 0
    found_count = 0
    for query in queries:
        if len(selected) == FIGURE:
            break
        drawn += 1
        if is_found(query):
            found_count += 1
            if query["code"] not in languages:
                languages.add(query["code"])
                selected.append(query)
    return {"queries": selected, "drawn": drawn, "found": found_count}


def find(data: Path, towers: Mapping[str, Path]) -> dict[str, Any]:
    """Measure the tower of each side and ask it for every query."""
    sets = open_sets(data / "all")
    caches = open_caches(data)
    for tower in towers.values():
        check_run(tower)
    reports = {
        side: evaluate_tower(tower, sets, caches) for side, tower in towers.items()
    }
    first = reports["before"]["test"][0].pairs
    languages = {
        caption.language for caption in first.captions if caption.kind == "short"
    }
    drawn = draw(first.meta_values("concept"), sorted(languages))
    queries = [ask(reports, *query) for query in drawn]
    figure = select(queries)
    queries = queries[:QUERIES]
    pictures_of = {}  # style -> concept -> picture
    for style, source in zip(SETS["test"], sets["test"], strict=True):
        concepts: set[str] = set()
        for query in (*queries, *figure["queries"]):
            if query["style"] == style:
                concepts.add(query["concept"])
                concepts.update(query["before"]["first"], query["after"]["first"])
        pictures_of[style] = pictures(source, concepts)
    return {
        "images": len(first.keys),
        "names": english_names(first),
        "recall": {side: recall(of_side) for side, of_side in reports.items()},
        "queries": queries,
        "figure": figure,
        "pictures": pictures_of,
    }


def tell(report: Mapping[str, Any]) -> list[str]:
    """What a terminal shows: recall, and the first queries."""
    lines = [
        f"Right picture found among {report['images']} drawings of things that training never saw, "
        "before -> after:"
    ]
    recall = report["recall"]
    for before, after in zip(recall["before"], recall["after"], strict=True):
        first = f"{before['first 1']:5.1f} % -> {after['first 1']:5.1f} %"
        ten = f"{before['first 10']:5.1f} % -> {after['first 10']:5.1f} %"
        lines.append(f"  {first} first, {ten} among ten: {before['title']}")
    lines.append("Names drawn at random, and the rank of their picture:")
    for query in report["queries"][:5]:
        name = report["names"][query["concept"]]
        rank_before = query["before"]["rank"]
        rank_after = query["after"]["rank"]
        ranks = f"{rank_before:3} -> {rank_after:3}"
        lines.append(f"  {ranks}  {query['text']}  ({query['language']}: {name})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart-output/default")
    )
    parser.add_argument("--seed", type=int, default=0, help="of the towers")
    options = parser.parse_args()
    target = options.output / "found.json"
    towers = {}
    for side, name in SIDES.items():
        towers[side] = options.output / "towers" / f"{name}-seed{options.seed}"
    is_current = target.is_file()
    if is_current:
        written = target.stat().st_mtime
        is_current = all(tower.stat().st_mtime <= written for tower in towers.values())
    if not is_current:
        report = find(options.data, towers)
        write_text(target, json.dumps(report, ensure_ascii=False))
    lines = tell(json.loads(target.read_text(encoding="utf-8")))
    write_text(options.output / "found.txt", "\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
