"""An unseen domain for the quickstart's towers: Tux Paint's stamps, photographs and drawings with whole sentences.

Photographs and drawings are galleries of their own, in which pictures with the same English sentence are all right for
it. The comparison of the teachers is that of ``claims``, with a correction for this domain's tests alone: the run's
headline is the same with and without it. Folders of stamps (birds, fruit) are drawn as a whole.

Without text, also for the tower before training: is the most similar other picture of the same kind (animals, food)?

Shapes: N pictures, H width of a pooled feature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from claims import Claim, Measured, Seeds, as_record, claims_table, headline, make_claims, signed
from page import Query, Section, Table
from pictures import best_pictures, choose_queries, english_names
from scores import RETRIEVAL, SIDES, of_style, query_scores, read_teachers, teacher_claims
from tables import TEACHERS, heads, recalls
from tuxpaint import SHARD

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.images import ImageFeatures, image_features, open_labeled_images
from llm2clip_plugin.evaluate.retrieval import EmbeddedPairs, RetrievalReport, embed_pairs, report_retrieval
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.dual import DualEncoder, LoadedDualEncoder
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import load_tower

NAME = "Tux Paint"
STYLES = {"photograph": "photographs", "drawing": "drawings"}
CAPTIONS = {"en": "English sentences", "other": "sentences in languages never trained on"}
TEACHER_TEST = "names in languages never trained on → English"
HEADLINE = (  # chosen before any number was seen
    "tower: photographs, sentences in languages never trained on, caption → image",
    "tower: photographs, English sentences, caption → image",
)
SAME_KIND = "nearest picture of the same kind"
PICTURED = 6  # captions with pictures on the page


@dataclass(frozen=True, kw_only=True)
class DomainTower:
    """A tower's measurements on the stamps."""

    name: str  # raw | tuned | shuffled
    seed: int
    pairs: EmbeddedPairs
    reports: dict[str, RetrievalReport]  # photograph | drawing
    same_kind: Measured

    @property
    def languages(self) -> list[str]:
        """Languages of the sentences, except English."""
        return sorted({caption.language for caption in self.pairs.captions} - {"en"})

    def rows(self) -> list[tuple[str, str, list[str]]]:
        """(name, style, languages) of each gallery and kind of caption."""
        return [
            (f"{STYLES[style]}, {words}", style, ["en"] if kind == "en" else self.languages)
            for style in STYLES
            if style in self.reports
            for kind, words in CAPTIONS.items()
        ]

    def queries(self, styles: Sequence[str], languages: Sequence[str], side: str) -> Measured:
        """Every query of these galleries and languages."""
        reports = [self.reports[style] for style in styles]
        return query_scores([(one, one.parts[f"short:{tag}"]) for one in reports for tag in languages], side)

    def recall(self, style: str, languages: Sequence[str], *, chance: bool = False) -> dict[str, float]:
        """R@1 and R@10, means over the languages."""
        parts = [self.reports[style].parts[f"short:{tag}"] for tag in languages]
        values = [part.chance((1, 10)) if chance else part.metrics((1, 10)) for part in parts]
        return {name: float(np.mean([value[name] for value in values])) for name in values[0]}


def open_domain(folder: Path) -> Source:
    """The stamps. Raises FileNotFoundError without their shard."""
    return open_source(SourceConfig(path=str(folder / SHARD)))


def has_domain(cache: EmbeddingCache) -> bool:
    """Whether a cache has the sentences' embeddings."""
    return Path(SHARD).stem in cache.manifest.shards


def measure_domain(folder: Path, dual: LoadedDualEncoder, cache: EmbeddingCache, source: Source) -> DomainTower:
    """Measure a tower directory, ``raw-seed0`` or the like, which is loaded as ``dual``."""
    images = ImageConfig.from_preprocessor(preprocessor_config(folder))
    pairs = embed_pairs(dual, source, cache, images, RetrievalConfig(kinds=("short",)), quiet=True)
    name, _, seed = folder.name.rpartition("-seed")
    return DomainTower(
        name=name,
        seed=int(seed),
        pairs=pairs,
        reports={
            style: report_retrieval(of_style(pairs, style), RETRIEVAL)
            for style in STYLES
            if style in pairs.meta_values("style")
        },
        same_kind=same_kind(dual.dual, source, images),
    )


# ------------------------------------------------------------------------------------------- without text


def same_kind_before(start: Path, pool: str, source: Source) -> Measured:
    """``same_kind`` of the tower before training, with the pooling of those after."""
    tower: Any = load_tower(start)
    width = tower.config.hidden_size * (2 if pool == "cls_mean" else 1)
    encoder = DualEncoder(tower, DualConfig(projection="none", projection_dim=width, pool=pool))
    return same_kind(encoder, source, ImageConfig.from_preprocessor(preprocessor_config(start)))


def same_kind(encoder: DualEncoder, source: Source, images: ImageConfig) -> Measured:
    """For each picture 1 if the most similar other one, by the tower's pooled features, is of its kind, else 0."""
    labeled = open_labeled_images(source.path, "kind", "family")
    return nearest_is_same(image_features(encoder.eval().pool, labeled, images, torch.device("cpu")))


def nearest_is_same(features: ImageFeatures) -> Measured:
    """As ``same_kind``, from features."""
    feature_NH, label_N = F.normalize(features.feature_ND, dim=1), features.label_N
    similarity_NN = (feature_NH @ feature_NH.T).fill_diagonal_(-torch.inf)
    hit_N = label_N[similarity_NN.argmax(1)] == label_N
    others_N = (label_N[:, None] == label_N).sum(1) - 1
    chance = float(others_N.double().mean() / (len(label_N) - 1))
    return Measured(scores=hit_N.double().numpy(), clusters=features.clusters, chance=chance, measure=SAME_KIND)


# ------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, kw_only=True)
class DomainReport:
    """What the towers and teachers do on the stamps."""

    towers: list[DomainTower]
    claims: list[Claim]  # the headline's first; [] without both teachers
    languages: list[Claim]  # of all pictures; a test per language and direction
    same_kind: list[Claim]  # towers after training against the one before
    source: Source

    @property
    def headlines(self) -> list[str]:
        """A sentence for each claim of the headline."""
        return [f"{NAME}, {headline(one)}" for one in self.claims if one.name in HEADLINE]

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """What was shown, and what was not: the name and the difference of every claim."""
        every = [*self.claims, *self.same_kind]
        return {
            title: [f"{one.name}: {signed(one.difference.difference)}" for one in every if one.significant == shown]
            for title, shown in (("differences shown (p < .05)", True), ("differences NOT shown", False))
        }

    @property
    def sentences(self) -> list[str]:
        """The headlines and verdicts."""
        verdicts = self.verdicts.items()
        return [*self.headlines, *(f"{NAME}, {title}: {'; '.join(names) or 'none'}." for title, names in verdicts)]

    @property
    def tables(self) -> list[Table]:
        """Claims, recall, languages, towers before and after."""
        tables = [self._recall_table()]
        if self.claims:
            tables.insert(0, claims_table(self.claims, TEACHERS, "Is the fine-tuned LLM the better teacher here?"))
            tables.append(claims_table(self.languages, TEACHERS, "In which languages?"))
        names = {"raw": "tower before training", "tuned": "after"}
        return [*tables, claims_table(self.same_kind, names, "Does the tower see more or less than before training?")]

    def _recall_table(self) -> Table:
        every = {name: [tower for tower in self.towers if tower.name == name] for name in TEACHERS}
        groups = {name: seeds for name, seeds in every.items() if seeds}
        rows = []
        for row, style, tags in self.towers[0].rows():
            recall = [[tower.recall(style, tags) for tower in seeds] for seeds in groups.values()]
            recall.append([self.towers[0].recall(style, tags, chance=True)])
            for side, title in SIDES.items():
                rows.append([f"{row}, {title}", *(recalls(seeds, side) for seeds in recall)])
        title = "How often is a right picture first, and among the first ten?"
        below = "R@1 / R@10. Pictures with the same English sentence are all right."
        return Table(head=["retrieval", *heads(groups), "chance"], rows=rows, below=below, title=title)

    @property
    def section(self) -> Section:
        """The page's part."""
        counts = [f"{len(one.pairs.keys)} {STYLES[style]}" for style, one in self.towers[0].reports.items()]
        words = (
            f"Stamps of the drawing program {NAME}: {' and '.join(counts)}, each with a sentence. The towers were "
            "trained on emoji and saw none of them. A stamp without a vector drawing counts as a photograph; a few are "
            "drawings. The pictures are under the GPL-2: whoever passes this page on passes that license on, too."
        )
        title = f"Does it carry over to photographs? {NAME}'s stamps"
        return Section(
            title=title,
            sentences=self.headlines,
            lists=self.verdicts,
            words=words,
            tables=self.tables,
            queries=self._queries(),
        )

    def _queries(self) -> list[Query]:
        first = {name: next((t for t in self.towers if t.name == name), None) for name in ("raw", "tuned")}
        shown = {TEACHERS[name]: tower.pairs for name, tower in first.items() if tower}
        pairs = next(iter(shown.values()))
        names, concepts = english_names(pairs), pairs.meta_values("concept")
        queries = []
        for number in choose_queries(pairs)[:PICTURED]:
            caption = pairs.captions[number]
            meaning = "" if caption.language == "en" else names[concepts[pairs.owner_M[number]]]
            found = {tower: best_pictures(embedded, self.source, number) for tower, embedded in shown.items()}
            queries.append(Query(text=caption.text, language=caption.language, meaning=meaning, found=found))
        return queries

    def as_record(self) -> dict[str, Any]:
        """For headline.json."""
        parts = {"claims": self.claims, "languages": self.languages, "same_kind": self.same_kind}
        return {"sentences": self.sentences, **{name: [as_record(one) for one in part] for name, part in parts.items()}}


def domain_report(
    towers: list[DomainTower], before: Measured, source: Source, caches: Mapping[str, EmbeddingCache]
) -> DomainReport:
    """Compare the towers, and the teachers' embeddings of the sentences. ``before``: see ``same_kind_before``."""
    pairs = {name: {tower.seed: tower for tower in towers if tower.name == name} for name in ("raw", "tuned")}

    def both(measured: Callable[[DomainTower], Measured]) -> tuple[Seeds, Seeds]:
        raw, tuned = ({seed: measured(tower) for seed, tower in seeds.items()} for seeds in pairs.values())
        return raw, tuned

    tests, languages = {}, {}
    if all(pairs.values()):
        for side, title in SIDES.items():
            for row, style, tags in towers[0].rows():
                queries = partial(DomainTower.queries, styles=[style], languages=tags, side=side)
                tests[f"tower: {row}, {title}"] = both(queries)
            for tag in ["en", *towers[0].languages]:
                queries = partial(DomainTower.queries, styles=list(towers[0].reports), languages=[tag], side=side)
                languages[f"{tag}, {title}"] = both(queries)
        (sides,) = teacher_claims(source, read_teachers(source, caches), [TEACHER_TEST]).values()
        tests[f"teacher: {CAPTIONS['other']} → English"] = sides
    after = {name: {seed: tower.same_kind for seed, tower in seeds.items()} for name, seeds in pairs.items() if seeds}
    kinds = {
        f"tower: {SAME_KIND}, {TEACHERS[name]} against before training": (dict.fromkeys(seeds, before), seeds)
        for name, seeds in after.items()
    }
    order = {name: place for place, name in enumerate(HEADLINE)}
    return DomainReport(
        towers=towers,
        claims=sorted(make_claims(tests), key=lambda one: order.get(one.name, len(order))),
        languages=make_claims(languages),
        same_kind=make_claims(kinds),
        source=source,
    )
