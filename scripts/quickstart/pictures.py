"""The pictures on the quickstart's page: captions chosen by a hash, and the drawings that the towers retrieve."""

import random
from collections.abc import Sequence

from page import Duel, Picture, Query
from shards import in_random_order
from tables import TEACHERS, Tower, by_name

from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.evaluate.retrieval import EmbeddedPairs

PICTURES = 8  # per caption and tower
DUELS = 20
DUEL_TEST = "names in languages never trained on"


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
    kinds = [kind for kind in ("long", "short") if any(place_kind == kind for place_kind, _, _ in place)]
    for kind, language in [*((kind, "en") for kind in kinds), *(("short", language) for language in languages)]:
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


def page_duels(towers: Sequence[Tower], source: Source) -> list[Duel]:
    """Queries drawn at random, always the same ones, and the place of the right drawing with either teacher's tower.

    Of the first seed; [] without towers of both teachers.
    """
    groups = by_name(towers)
    if "raw" not in groups or "tuned" not in groups:
        return []
    raw, tuned = (groups[name][0].scores for name in ("raw", "tuned"))
    names = english_names(raw.pairs)
    concept_of = dict(zip(raw.pairs.keys, raw.pairs.meta_values("concept"), strict=True))
    both = list(zip(raw.places(DUEL_TEST), tuned.places(DUEL_TEST), strict=True))
    random.Random(0).shuffle(both)
    distinct = {(before.caption.language, before.caption.text): (before, after) for before, after in both}
    duels = []
    for before, after in list(distinct.values())[:DUELS]:  # a name in one style
        meaning = names[concept_of[before.key]]
        png = source[raw.pairs.keys.index(before.key)].read_image()
        duels.append(
            Duel(
                picture=Picture(png=png, title=meaning, right=True),
                text=before.caption.text,
                language=before.caption.language,
                meaning=meaning,
                raw=before.place,
                tuned=after.place,
                pool=before.pool,
            )
        )
    return duels
