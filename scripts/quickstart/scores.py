"""The quickstart's measurements of a tower: retrieval on families, a style and languages that training never saw.

Each style is a separate gallery with one drawing, and one caption of each kind, per concept, so that chance is
1 / concepts both ways; scores are means over the styles.

Shape letters: N images, M captions, D projection dimension, W LLM embedding width.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from claims import Measured, Seeds, chance_of, reciprocal_ranks
from torch import Tensor

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.retrieval import (
    EmbeddedPairs,
    QueryRanks,
    Retrieval,
    RetrievalReport,
    embed_pairs,
    report_retrieval,
)
from llm2clip_plugin.vision.dual import LoadedDualEncoder

SEEN_STYLES = "{noto,twemoji,fluent}"
SETS = {  # name -> shards
    "test": f"test-{SEEN_STYLES}.tar",
    "unseen style": "test-openmoji.tar",
}
TESTS = {  # row of the table -> (set, kind of caption); "other": names in every language except English
    "test families, long captions": ("test", "long"),
    "test families, names": ("test", "short"),
    "unseen style (openmoji), long captions": ("unseen style", "long"),
    "names in languages never trained on": ("test", "other"),
}
LONG_CAPTIONS = "test families, long captions"
MEASURES = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")
SIDES = {"i2t": "image → caption", "t2i": "caption → image"}
RETRIEVAL = RetrievalConfig(group="concept", cluster="family", ks=(1, 10))
TEACHER_TESTS = {  # (kind of query, kind of answer); "other": names in every language except English
    "name → keywords without its words": ("short", "keywords"),
    "name → long caption": ("short", "long"),
    "names in languages never trained on → English": ("other", "short"),
}


def open_sets(data: Path) -> dict[str, Source]:
    """Set -> its samples; the unseen style may be missing."""
    sources = {name: str(data / pattern) for name, pattern in SETS.items()}
    if not (data / SETS["unseen style"]).is_file():
        del sources["unseen style"]
    return {name: open_source(SourceConfig(path=path)) for name, path in sources.items()}


def open_captions(data: Path) -> Source:
    """The test set in one style: every style has the same captions."""
    return open_source(SourceConfig(path=str(data / "test-noto.tar")))


class Place(NamedTuple):
    """The place of a caption's right drawing."""

    caption: Caption
    key: str  # of the drawing
    place: float  # 1: first; between two if scores are equal
    pool: int  # drawings


@dataclass(frozen=True, kw_only=True)
class TowerScores:
    """The measurements of one tower."""

    reports: dict[str, list[RetrievalReport]]  # set -> a report for each style
    pairs: EmbeddedPairs  # the test set, all styles, in the tower's joint space

    @property
    def languages(self) -> list[str]:
        """Languages of the test set's names, except English."""
        parts = (name.split(":") for name in self.reports["test"][0].parts if ":" in name)
        return sorted(language for kind, language in parts if kind == "short" and language != "en")

    def part(self, set_name: str, kind: str, language: str = "en", *, chance: bool = False) -> dict[str, float]:
        """MEASURES of one kind and language of captions on one set; with ``chance``, those of a random order."""
        parts = [report.parts[f"{kind}:{language}"] for report in self.reports[set_name]]
        values = [part.chance((1, 10)) if chance else part.metrics((1, 10)) for part in parts]
        return {name: float(np.mean([value[name] for value in values])) for name in MEASURES}

    def tests(self, *, chance: bool = False) -> dict[str, dict[str, float]]:
        """Row of the table -> MEASURES; a missing set has no row."""
        rows = {}
        for row, (set_name, kind) in TESTS.items():
            if set_name not in self.reports:
                continue
            languages = self.languages if kind == "other" else ["en"]
            each = [self.part(set_name, "short" if kind == "other" else kind, tag, chance=chance) for tag in languages]
            rows[row] = {name: float(np.mean([values[name] for values in each])) for name in MEASURES}
        return rows

    def queries(self, test: str, side: str) -> Measured:
        """Every query of a row of the table, i2t or t2i."""
        return query_scores(self._parts(test), side)

    def places(self, test: str) -> list[Place]:
        """Where each caption's right drawing is among those of its style, in the order of ``queries(test, "t2i")``."""
        found = []
        for report, part in self._parts(test):
            ahead_Q = part.t2i.higher_Q + part.t2i.wrong_equal_Q / 2
            for caption, ahead in zip(part.caption_index_Q.tolist(), ahead_Q.tolist(), strict=True):
                key = report.pairs.keys[report.pairs.owner_M[caption]]
                found.append(Place(report.pairs.captions[caption], key, 1 + ahead, len(report.cluster_N)))
        return found

    def _parts(self, test: str) -> Iterator[tuple[RetrievalReport, Retrieval]]:
        """Each style's report with the ranks of each of the test's languages."""
        set_name, kind = TESTS[test]
        names = [f"short:{tag}" for tag in self.languages] if kind == "other" else [f"{kind}:en"]
        for report in self.reports[set_name]:
            for name in names:
                yield report, report.parts[name]


def query_scores(parts: Iterable[tuple[RetrievalReport, Retrieval]], side: str) -> Measured:
    """Every query of one direction, i2t or t2i, in each of the parts."""
    scores, clusters, chances = [], [], []
    for report, part in parts:
        images = part.image_index_Q if side == "i2t" else report.pairs.owner_M[part.caption_index_Q]
        scores.append(reciprocal_ranks(part.i2t if side == "i2t" else part.t2i))
        clusters += [report.cluster_N[image] for image in images.tolist()]
        pool = (part.caption_label_Q if side == "i2t" else part.image_label_N).tolist()
        size = Counter(pool)  # label -> right answers
        queries = Counter(size[label] for label in part.image_label_N[images].tolist())
        chances.append(sum(chance_of(len(pool), right) * n for right, n in queries.items()) / len(images))
    return Measured(scores=np.concatenate(scores), clusters=clusters, chance=float(np.mean(chances)))


def tower_scores(
    dual: LoadedDualEncoder, sets: dict[str, Source], cache: EmbeddingCache, images: ImageConfig
) -> TowerScores:
    """Measure a tower on every set."""
    pairs = {
        name: embed_pairs(dual, source, cache, images, RetrievalConfig(kinds=("short", "long")), quiet=True)
        for name, source in sets.items()
    }
    reports = {
        name: [report_retrieval(of_style(embedded, s), RETRIEVAL) for s in sorted(set(embedded.meta_values("style")))]
        for name, embedded in pairs.items()
    }
    return TowerScores(reports=reports, pairs=pairs["test"])


def of_style(pairs: EmbeddedPairs, style: str) -> EmbeddedPairs:
    """The drawings of one style with their captions."""
    drawn_N = torch.tensor([one == style for one in pairs.meta_values("style")])
    captioned_M = drawn_N[pairs.owner_M]
    number_N = drawn_N.cumsum(0) - 1  # an image's number within the style
    return EmbeddedPairs(
        image_ND=pairs.image_ND[drawn_N],
        text_MD=pairs.text_MD[captioned_M],
        owner_M=number_N[pairs.owner_M[captioned_M]],
        captions=list(compress(pairs.captions, captioned_M.tolist())),
        keys=list(compress(pairs.keys, drawn_N.tolist())),
        meta=list(compress(pairs.meta, drawn_N.tolist())),
        broken=[],
    )


# ----------------------------------------------------------------------------------------------- teachers


Rows = dict[tuple[str, str], dict[str, Tensor]]  # (kind, language) -> concept -> (W,) embedding, each concept once


def caption_rows(source: Source, cache: EmbeddingCache) -> Rows:
    """The teacher's embeddings of the captions."""
    embeddings: Rows = {}
    for number in range(len(source)):
        sample = source[number]
        rows = cache.rows(*source.locate(number), sample.captions, key=sample.key)
        for caption, row in zip(sample.captions, rows, strict=True):
            embeddings.setdefault((caption.kind, caption.language), {}).setdefault(sample.meta["concept"], row)
    return embeddings


def teacher_scores(rows: Rows) -> dict[str, float]:
    """Top-1 caption retrieval of the teacher, without images: plain, and with the mean embedding subtracted."""
    return {
        f"{test}, {label}": float(np.mean([ranks.hits(1).mean() for ranks, _ in teacher_ranks(rows, test, center)]))
        for center, label in ((False, "plain"), (True, "centered"))
        for test in TEACHER_TESTS
    }


def teacher_queries(
    rows: Rows, family: Mapping[str, str], tests: Iterable[str] = tuple(TEACHER_TESTS)
) -> dict[str, Measured]:
    """Test -> every query of the teacher's caption retrieval, plain; ``family`` of each concept."""
    found = {}
    for test in tests:
        ranked = teacher_ranks(rows, test, center=False)
        found[test] = Measured(
            scores=np.concatenate([reciprocal_ranks(ranks) for ranks, _ in ranked]),
            clusters=[family[concept] for _, concepts in ranked for concept in concepts],
            chance=float(np.mean([chance_of(len(concepts)) for _, concepts in ranked])),
        )
    return found


def teacher_ranks(rows: Rows, test: str, center: bool) -> list[tuple[QueryRanks, list[str]]]:
    """Ranks of a test's queries and their concepts, for each language of the queries."""
    asked, answered = TEACHER_TESTS[test]
    items = rows[answered, "en"]
    languages = sorted(language for kind, language in rows if kind == "short" and language != "en")
    queries = [rows["short", language] for language in languages] if asked == "other" else [rows[asked, "en"]]
    ranked = []
    for of_language in queries:
        shared = [concept for concept in of_language if concept in items]
        query, item = (torch.stack([side[concept] for concept in shared]) for side in (of_language, items))
        ranked.append((caption_ranks(query, item, center=center)[0], shared))
    return ranked


def read_teachers(source: Source, caches: Mapping[str, EmbeddingCache]) -> dict[str, Rows]:
    """Cache -> its embeddings of the test captions, which are the same in every style."""
    return {name: caption_rows(source, cache) for name, cache in caches.items()}


def teacher_claims(
    source: Source, teachers: Mapping[str, Rows], tests: Iterable[str] = tuple(TEACHER_TESTS), base: str = "raw"
) -> dict[str, tuple[Seeds, Seeds]]:
    """Test -> queries of the LLM ``base``, the same for every seed, and of each adapter; {} without either."""
    family = {meta["concept"]: meta["family"] for meta in (source[number].meta for number in range(len(source)))}
    measured = {name: teacher_queries(rows, family, tests) for name, rows in teachers.items()}
    tuned = {seed_of(name): scores for name, scores in measured.items() if name.startswith("tuned-")}
    if base not in measured or not tuned:
        return {}
    return {
        f"teacher: {test}": (dict.fromkeys(tuned, raw), {seed: scores[test] for seed, scores in tuned.items()})
        for test, raw in measured[base].items()
    }


def seed_of(folder: str) -> int:
    """The number at the end of ``tuned-seed0``."""
    return int(folder.rpartition("-seed")[2])
