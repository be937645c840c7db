"""What the quickstart's table says of a tower: retrieval on families, a style and languages that training never saw.

A drawing is right for every caption of its concept, and a concept's caption is in the pool once, however many drawings
carry it; so chance is 1 / concepts both ways.

Shape letters: N images, M captions, D joint width, W LLM embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2clip_plugin.data.base import Source
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.evaluate.measure import RetrievalConfig, RetrievalReport, evaluate_retrieval
from llm2clip_plugin.vision.dual import LoadedDualEncoder

SEEN_STYLES = "{noto,twemoji,fluent}"
SETS = {  # name -> shards
    "validation": f"validation-{SEEN_STYLES}.tar",
    "test": f"test-{SEEN_STYLES}.tar",
    "unseen style": "test-openmoji.tar",
}
TESTS = {  # row of the table -> (set, kind of caption); every language but English where the kind is "other"
    "validation families, long captions": ("validation", "long"),
    "test families, long captions": ("test", "long"),
    "test families, names": ("test", "short"),
    "unseen style (openmoji), long captions": ("unseen style", "long"),
    "languages never trained on, names": ("test", "other"),
}
LONG_CAPTIONS = "test families, long captions"
MEASURES = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")
RETRIEVAL = RetrievalConfig(kinds=("short", "long"), group="concept", cluster="family", ks=(1, 10))


def open_sets(data: Path) -> dict[str, Source]:
    """Set -> its images; the unseen style may be missing."""
    sources = {name: str(data / pattern) for name, pattern in SETS.items()}
    if not (data / SETS["unseen style"]).is_file():
        del sources["unseen style"]
    return {name: open_source(SourceConfig(path=path)) for name, path in sources.items()}


@dataclass(frozen=True, kw_only=True)
class TowerScores:
    """Everything measured of one tower."""

    reports: dict[str, RetrievalReport]  # set -> report

    @property
    def languages(self) -> list[str]:
        """Languages other than English, as the test set has them."""
        parts = (name.split(":") for name in self.reports["test"].parts if ":" in name)
        return sorted(language for kind, language in parts if kind == "short" and language != "en")

    def part(self, where: str, kind: str, language: str = "en", *, chance: bool = False) -> dict[str, float]:
        """MEASURES of one kind and language of captions on one set, or what a random order reaches."""
        found = self.reports[where].parts[f"{kind}:{language}"]
        values = found.chance((1, 10)) if chance else found.metrics((1, 10))
        return {name: values[name] for name in MEASURES}

    def tests(self, *, chance: bool = False) -> dict[str, dict[str, float]]:
        """Row of the table -> MEASURES; a set that is missing has no row."""
        rows = {}
        for row, (where, kind) in TESTS.items():
            if where not in self.reports:
                continue
            languages = self.languages if kind == "other" else ["en"]
            each = [self.part(where, "short" if kind == "other" else kind, tag, chance=chance) for tag in languages]
            rows[row] = {name: float(np.mean([values[name] for values in each])) for name in MEASURES}
        return rows

    def hits(self) -> np.ndarray:
        """Image -> long caption R@1 of each test image."""
        return self.reports["test"].parts["long:en"].i2t.hits(1).numpy()


def tower_scores(
    dual: LoadedDualEncoder, sets: dict[str, Source], cache: EmbeddingCache, images: ImageConfig
) -> TowerScores:
    """Put a tower to every test."""
    reports = {
        name: evaluate_retrieval(dual, source, cache, images, RETRIEVAL, quiet=True) for name, source in sets.items()
    }
    return TowerScores(reports=reports)


# ----------------------------------------------------------------------------------------------- teachers


def caption_rows(source: Source, cache: EmbeddingCache) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(kind, language) -> concept -> (W,) embedding, each concept once."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for number in range(len(source)):
        key, captions = source.captions(number)
        concept = source.raw(number).meta["concept"]
        rows = cache.rows(*source.locate(number), captions, key=key)
        for caption, row in zip(captions, rows, strict=True):
            found.setdefault((caption.kind, caption.language), {}).setdefault(concept, row)
    return found


def teacher_scores(source: Source, cache: EmbeddingCache) -> dict[str, float]:
    """Caption retrieval top-1 of the teacher itself, without any image, plain and with the mean taken off."""
    rows = caption_rows(source, cache)
    names = rows["short", "en"]
    others = [of_language for (_, language), of_language in rows.items() if language != "en"]
    found = {}
    for centre, label in ((False, "plain"), (True, "centred")):
        found[f"name → keywords without its words, {label}"] = accuracy(names, rows["keywords", "en"], centre)
        found[f"name → long caption, {label}"] = accuracy(names, rows["long", "en"], centre)
        found[f"names of {len(others)} other languages → English, {label}"] = float(
            np.mean([accuracy(of_language, names, centre) for of_language in others])
        )
    return found


def accuracy(queries: dict[str, Tensor], items: dict[str, Tensor], centre: bool) -> float:
    """Share of queries whose best item is their concept's, over the concepts that both have."""
    shared = [concept for concept in queries if concept in items]
    query, item = (torch.stack([rows[concept] for concept in shared]) for rows in (queries, items))
    there, _ = caption_ranks(query, item, centre=centre)
    return float(there.hits(1).mean())
