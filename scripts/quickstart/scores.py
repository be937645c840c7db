"""What the quickstart's table says of a tower: retrieval on families, a style and languages that training never saw.

An image's label is its concept: every drawing of a concept is right for the concept's caption. Each caption of a
concept is in the pool once, however many drawings carry it, so chance is 1 / concepts both ways.

Shape letters: N images, M captions, D joint width, W LLM embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llm2clip_plugin.data.base import Source
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import eval_pairs
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.evaluate.retrieval import retrieve
from llm2clip_plugin.vision.dual import LoadedDualEncoder

SEEN_STYLES = ("noto", "twemoji", "fluent")
UNSEEN_STYLE = "openmoji"
MEASURES = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Embeddings of one kind and language, one a concept."""

    concepts: list[str]
    texts: list[str]
    embedding_MW: Tensor


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A split: what is known of its images, and its captions by (kind, language)."""

    source: Source
    concepts: list[str]  # of each image
    families: list[str]
    styles: list[str]
    captions: dict[tuple[str, str], Captions]

    @property
    def languages(self) -> list[str]:
        """Languages other than English."""
        return sorted({language for _, language in self.captions if language != "en"})

    def label(self, concepts: Sequence[str]) -> Tensor:
        """int64 label of each concept."""
        number = {concept: place for place, concept in enumerate(dict.fromkeys(self.concepts))}
        return torch.tensor([number[concept] for concept in concepts])

    def of_styles(self, styles: Sequence[str]) -> Tensor:
        """Positions of the images of these styles."""
        return torch.tensor([place for place, style in enumerate(self.styles) if style in styles], dtype=torch.int64)


def read_pool(source: Source, cache: EmbeddingCache) -> Pool:
    """Descriptions of every image of the split, and each concept's captions with their embeddings."""
    metas, found = [], {}
    for number in range(len(source)):
        raw = source.raw(number)
        metas.append(raw.meta)
        key, captions = source.captions(number)
        concept = raw.meta["concept"]
        new = [c for c in captions if concept not in found.get((c.kind, c.language), {})]
        rows = cache.rows(*source.locate(number), new, key=key)
        for caption, row in zip(new, rows, strict=True):
            found.setdefault((caption.kind, caption.language), {})[concept] = (caption.text, row)
    return Pool(
        source=source,
        concepts=[meta["concept"] for meta in metas],
        families=[meta["family"] for meta in metas],
        styles=[meta["style"] for meta in metas],
        captions={
            kind: Captions(
                concepts=list(rows),
                texts=[text for text, _ in rows.values()],
                embedding_MW=torch.stack([row for _, row in rows.values()]),
            )
            for kind, rows in found.items()
        },
    )


@torch.inference_mode()
def image_features(dual: LoadedDualEncoder, source: Source, images: ImageConfig, batch: int = 64) -> Tensor:
    """(N, D) of every image of a source, in order. Raises ValueError for a broken one."""
    pairs = eval_pairs(source, None, images, batch=batch)
    features = [dual.encode_image(found["pixel_values"]) for found in pairs]
    if pairs.broken:
        raise ValueError(f"{len(pairs.broken)} broken images in {source.path}; the first: {pairs.broken[0]}")
    return torch.cat(features)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One test of one tower."""

    metrics: dict[str, float]  # MEASURES, fractions
    chance: dict[str, float]
    images: int
    captions: int
    hits_N: np.ndarray = field(repr=False)  # image -> text R@1 of each image
    families_N: list[str] = field(repr=False)  # the clusters of hits_N


@torch.inference_mode()
def score(
    pool: Pool, image_ND: Tensor, dual: LoadedDualEncoder, kind: str, language: str, styles: Sequence[str]
) -> Score:
    """Retrieval both ways between the images of ``styles`` and the captions of one kind and language."""
    place = pool.of_styles(styles)
    captions = pool.captions[kind, language]
    found = retrieve(
        image_ND[place],
        dual.encode_text(captions.embedding_MW),
        pool.label([pool.concepts[p] for p in place.tolist()]),
        pool.label(captions.concepts),
    )
    metrics, chance = found.metrics((1, 10)), found.chance((1, 10))
    queries = place[found.image_index_Q].tolist()
    return Score(
        metrics={name: metrics[name] for name in MEASURES},
        chance={name: chance[name] for name in MEASURES},
        images=len(place),
        captions=len(captions.concepts),
        hits_N=found.i2t.hits(1).numpy(),
        families_N=[pool.families[p] for p in queries],
    )


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean over several tests, over languages for example."""
    return Score(
        metrics={name: float(np.mean([s.metrics[name] for s in scores])) for name in MEASURES},
        chance={name: float(np.mean([s.chance[name] for s in scores])) for name in MEASURES},
        images=scores[0].images,
        captions=scores[0].captions,
        hits_N=np.concatenate([s.hits_N for s in scores]),
        families_N=[family for s in scores for family in s.families_N],
    )


TESTS = {  # name in the table -> (split, kind, language or "other", styles)
    "validation families, long captions": ("validation", "long", "en", SEEN_STYLES),
    "test families, long captions": ("test", "long", "en", SEEN_STYLES),
    "test families, names": ("test", "short", "en", SEEN_STYLES),
    "unseen style (openmoji), long captions": ("test", "long", "en", (UNSEEN_STYLE,)),
    "languages never trained on, names": ("test", "short", "other", SEEN_STYLES),
}


def tower_scores(
    dual: LoadedDualEncoder, pools: dict[str, Pool], image_ND: dict[str, Tensor]
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Every test of the table that the pools allow, and the languages one by one."""
    scores, by_language = {}, {}
    for name, (split, kind, language, styles) in TESTS.items():
        pool = pools[split]
        if not set(styles) & set(pool.styles):
            continue  # the unseen style could not be drawn
        if language != "other":
            scores[name] = score(pool, image_ND[split], dual, kind, language, styles)
            continue
        by_language = {other: score(pool, image_ND[split], dual, kind, other, styles) for other in pool.languages}
        scores[name] = mean_score(list(by_language.values()))
    return scores, by_language


def teacher_scores(pool: Pool) -> dict[str, float]:
    """Caption retrieval top-1 of the teacher itself, without any image, plain and with the mean taken off."""
    found = {}
    names = pool.captions["short", "en"]
    for centre, label in ((False, "plain"), (True, "centred")):
        for title, kind in (("name -> keywords without its words", "keywords"), ("name -> long caption", "long")):
            found[f"{title}, {label}"] = pair_accuracy(names, pool.captions[kind, "en"], centre)
        others = [pair_accuracy(pool.captions["short", language], names, centre) for language in pool.languages]
        found[f"names in {len(others)} other languages -> English, {label}"] = float(np.mean(others))
    return found


def pair_accuracy(queries: Captions, items: Captions, centre: bool) -> float:
    """Share of queries whose best item is their concept's, among the concepts that have both."""
    shared = [concept for concept in queries.concepts if concept in set(items.concepts)]
    query = queries.embedding_MW[[queries.concepts.index(concept) for concept in shared]]
    item = items.embedding_MW[[items.concepts.index(concept) for concept in shared]]
    there, _ = caption_ranks(query, item, centre=centre)
    return float(there.hits(1).mean())
