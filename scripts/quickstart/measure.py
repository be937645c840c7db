"""Measure the quickstart's towers and teachers on data that training never saw.

A tower is measured with the cache of its name, and refused if its records name other shards, caches
or adapters.

Each style is a gallery of its own with one drawing, and one caption of each kind, per concept, so
that chance is 1 / concepts both ways. The measure is the mean reciprocal rank: every query counts
by the rank of its right answer.

Shapes: N images, M captions, Q queries, W width of an embedding.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from inputs import RANDOM
from linear_map import MAP, read_record

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.contracts import CacheManifest, RunRecord, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import Sample
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.ranks import QueryRanks
from llm2clip_plugin.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from llm2clip_plugin.text.adapter import adapter_sha256
from llm2clip_plugin.vision.towers import preprocessor_config

# name -> styles
SETS = {
    "test": ("noto", "twemoji", "fluent"),
    "unseen style": ("openmoji",),
}
# row of the table -> (set, kind of caption); "other": names in every language except English
TESTS = {
    "test families, long captions": ("test", "long"),
    "test families, names": ("test", "short"),
    "unseen style (openmoji), long captions": ("unseen style", "long"),
    "names in languages of neither stage": ("test", "other"),
}
SIDES = {"i2t": "image → caption", "t2i": "caption → image"}
RETRIEVAL = RetrievalConfig(
    kinds=("short", "long"), group="concept", cluster="family", ks=(1, 10)
)
# (kind of query, kind of answer); "other": names in every language except English; CLEAN: keywords
# of the concepts whose name shares no stem with them
CLEAN = "clean keywords"
TEACHER_TESTS = {
    "name → keywords without its words": ("short", "keywords"),
    "name → keywords, no stem in common": ("short", CLEAN),
    "name → long caption": ("short", "long"),
    "names in languages of neither stage → English": ("other", "short"),
}
TEACHERS = {  # part of a folder's name -> what the tables call it
    "raw": "raw LLM, read well",
    "map": "linear map on the raw LLM",
    "tuned": "fine-tuned LLM",
    "plain": "raw LLM, as it comes",
    "random": "random embeddings",
    "shuffled": "control: wrong pictures",
}
STEM = 4  # letters; words that begin with the same ones have one stem
RERUN = "delete it and rerun scripts/quickstart.sh"


class Measured(NamedTuple):
    """The score of every query in one test."""

    scores: np.ndarray  # (Q,) reciprocal ranks
    clusters: list[str]  # Q: the queries' families
    chance: float  # mean of a random order


# of queries: their ranks, their families, and the number of items
Gallery = tuple[QueryRanks, list[str], int]
Rows = dict[str, Measured]  # row of the tables -> its queries
# (kind, language) -> concept, each once -> (W,)
Embeddings = dict[tuple[str, str], dict[str, torch.Tensor]]


# Ranks


def reciprocal_ranks(ranks: QueryRanks) -> np.ndarray:
    """(Q,) 1 / rank of the best correct item: the expected value, as items of equal score are in
    random order."""
    wrong_Q = ranks.wrong_equal_Q.numpy()
    correct_Q = ranks.correct_equal_Q.numpy()
    higher_Q = ranks.higher_Q.numpy()
    score_Q = np.zeros(len(higher_Q))
    # probability that the first ``ahead`` items of this score are all wrong
    none_yet_Q = np.ones(len(higher_Q))
    for ahead in range(wrong_Q.max() + 1):
        left_Q = np.maximum(wrong_Q + correct_Q - ahead, 1)
        score_Q += none_yet_Q * correct_Q / left_Q / (higher_Q + 1 + ahead)
        none_yet_Q *= np.maximum(wrong_Q - ahead, 0) / left_Q
    return score_Q


def measured(galleries: Sequence[Gallery]) -> Measured:
    """The queries of several galleries; one item of each gallery is right."""
    scores = [reciprocal_ranks(ranks) for ranks, _, _ in galleries]
    clusters = [family for _, families, _ in galleries for family in families]
    chances = [np.mean(1 / np.arange(1, items + 1)) for _, _, items in galleries]
    return Measured(np.concatenate(scores), clusters, float(np.mean(chances)))


# Towers


def open_sets(data: Path) -> dict[str, list[Source]]:
    """Set -> its samples in each style; the unseen style may be missing."""
    sets = {}
    for name, styles in SETS.items():
        shards = [data / f"test-{style}.tar" for style in styles]
        if name == "test" or shards[0].is_file():
            sets[name] = [
                open_source(SourceConfig(path=str(shard))) for shard in shards
            ]
    return sets


def measure_tower(
    path: Path, sets: Mapping[str, list[Source]], caches: Mapping[str, EmbeddingCache]
) -> Rows:
    """Load a tower directory, ``tuned-seed0`` or the like, and measure it on every set, with the
    cache of its name. Raises ContractError if no cache belongs to its teacher."""
    return rows_of(evaluate_tower(path, sets, caches))


def evaluate_tower(
    path: Path, sets: Mapping[str, list[Source]], caches: Mapping[str, EmbeddingCache]
) -> dict[str, list[RetrievalReport]]:
    """Set -> the tower's retrieval in each style. Raises ContractError if no cache belongs to its
    teacher."""
    dual = load_dual_encoder(path)
    images = ImageConfig.from_preprocessor(preprocessor_config(path))
    cache = cache_of(path, dual.card.teacher, caches)
    reports: dict[str, list[RetrievalReport]] = {}
    for name, sources in sets.items():
        reports[name] = [
            evaluate_retrieval(dual, source, cache, images, RETRIEVAL, quiet=True)
            for source in sources
        ]
    return reports


def rows_of(reports: Mapping[str, Sequence[RetrievalReport]]) -> Rows:
    """Every test of the sets that were evaluated, in both directions."""
    rows = {}
    for test, (set_name, kind) in TESTS.items():
        for side, title in SIDES.items():
            if set_name in reports:
                rows[f"{test}, {title}"] = tower_queries(reports[set_name], kind, side)
    return rows


def tower_queries(reports: Sequence[RetrievalReport], kind: str, side: str) -> Measured:
    """Every query of one direction, i2t or t2i: of each style, in each of the kind's languages."""
    return measured(tower_galleries(reports, kind, side))


def tower_galleries(
    reports: Sequence[RetrievalReport], kind: str, side: str
) -> list[Gallery]:
    """The queries of one direction, by style and language."""
    parts = [f"{kind}:en"]
    if kind == "other":
        names = [name for name in reports[0].parts if name.startswith("short:")]
        parts = sorted(name for name in names if name != "short:en")
    galleries = []
    for report, name in itertools.product(reports, parts):
        part = report.parts[name]
        ranks, index_Q = part.sides[side]
        if side == "i2t":
            images = index_Q
            items = len(part.sides["t2i"][0])
        else:
            images = report.pairs.owner_M[index_Q]
            items = len(report.pairs.keys)
        families = [report.cluster_N[image] for image in images.tolist()]
        galleries.append((ranks, families, items))
    return galleries


# Teachers


def measure_teachers(
    source: Source, caches: Mapping[str, EmbeddingCache]
) -> dict[str, Rows]:
    """Each teacher's caption retrieval on the test set, whose captions are the same in every
    style."""
    samples = [source[number] for number in range(len(source))]
    family = {sample.meta["concept"]: sample.meta["family"] for sample in samples}
    clean = clean_concepts(samples)
    rows_of_teacher = {}
    for name, cache in caches.items():
        embeddings = read_embeddings(source, samples, cache)
        keywords = embeddings.get(("keywords", "en"), {})
        embeddings[CLEAN, "en"] = {
            concept: row for concept, row in keywords.items() if concept in clean
        }
        rows_of_teacher[name] = teacher_queries(embeddings, family)
    return rows_of_teacher


def read_embeddings(
    source: Source, samples: Sequence[Sample], cache: EmbeddingCache
) -> Embeddings:
    """The embeddings of a source's captions."""
    embeddings = Embeddings()
    for number, sample in enumerate(samples):
        shard, index = source.locate(number)
        rows = cache.rows(shard, index, sample.captions, key=sample.key)
        for caption, row in zip(sample.captions, rows, strict=True):
            of_part = embeddings.setdefault((caption.kind, caption.language), {})
            of_part.setdefault(sample.meta["concept"], row)
    return embeddings


def clean_concepts(samples: Sequence[Sample]) -> set[str]:
    """The concepts with keywords of which none shares a stem with a word of the English name."""
    clean = set()
    for sample in samples:
        stems: dict[str, set[str]] = {"short": set(), "keywords": set()}
        for caption in sample.captions:
            if caption.language == "en" and caption.kind in stems:
                words = re.findall(r"\w+", caption.text.lower())
                stems[caption.kind] |= {word[:STEM] for word in words}
        if stems["keywords"] and not stems["short"] & stems["keywords"]:
            clean.add(sample.meta["concept"])
    return clean


def teacher_queries(embeddings: Embeddings, family: Mapping[str, str]) -> Rows:
    """Test -> every query of the teacher's caption retrieval, in each language; ``family`` of each
    concept."""
    other_languages = sorted(
        part for part in embeddings if part[0] == "short" and part[1] != "en"
    )
    rows = {}
    for test, (query_kind, answer_kind) in TEACHER_TESTS.items():
        answers = embeddings[answer_kind, "en"]
        parts = other_languages if query_kind == "other" else [(query_kind, "en")]
        galleries = []
        for part in parts:
            shared = [concept for concept in embeddings[part] if concept in answers]
            query = torch.stack([embeddings[part][concept] for concept in shared])
            item = torch.stack([answers[concept] for concept in shared])
            ranks, _ = caption_ranks(query, item)
            families = [family[concept] for concept in shared]
            galleries.append((ranks, families, len(shared)))
        rows[test] = measured(galleries)
    return rows


# What may be measured: caches of the adapter of their name, towers of the shards and the cache of
# theirs


def open_caches(data: Path) -> dict[str, EmbeddingCache]:
    """Teacher -> cache below ``data``/cache, checked; incomplete caches are left out. Raises
    FileNotFoundError if no cache is complete, ContractError if one is not what its name says."""
    folders = []
    for manifest in sorted((data / "cache").glob(f"*/{CacheManifest.FILE}")):
        if CacheManifest.read(manifest).complete:
            folders.append(manifest.parent)
    if not folders:
        raise FileNotFoundError(
            f"no complete embedding cache in {data / 'cache'}; run scripts/quickstart.sh"
        )
    caches = {folder.name: EmbeddingCache.open(folder) for folder in folders}
    for name, cache in caches.items():
        check_cache(data, name, cache)
    return caches


def check_cache(data: Path, name: str, cache: EmbeddingCache) -> None:
    """Raise ContractError for a cache that is not what its name says: of another adapter or map, or
    one that was trained on other captions."""
    teacher = cache.manifest.teacher
    used: dict[str, Any] = {
        "random": teacher["llm"] == RANDOM,
        "map": teacher["llm"] == MAP,
        "adapter": teacher["adapter_sha256"],
        "trained on": [],
        "pooling": teacher["pooling"],
        "post": bool(teacher["post"]),
    }
    expected: dict[str, Any] = {
        "random": name == "random",
        "map": name.startswith("map-"),
        "adapter": "",
        "trained on": [],
        "pooling": "mean" if name == "plain" else "last",
        "post": name == "raw" or name.startswith("map-"),
    }
    if name.startswith("tuned-"):
        run = data / "llm" / name.removeprefix("tuned-")
        shards = RunRecord.read(run / RunRecord.FILE).config["pairs"]["data"]
        used["trained on"] = [Path(shard).name for shard in shards]
        expected["adapter"] = adapter_sha256(run / "adapter")
        expected["trained on"] = ["train-noto.tar"]
    if used["map"] and expected["map"]:
        record = read_record(cache)
        used["trained on"] = record["captions"]
        expected["trained on"] = ["train-noto.tar"]
        used["seed"] = record["seed"]
        expected["seed"] = int(name.removeprefix("map-seed"))
    if used != expected:
        raise ContractError(
            f"{cache.directory} was embedded with {used}, expected {expected}; {RERUN}"
        )


def cache_of(
    tower: Path, teacher: Mapping[str, Any], caches: Mapping[str, EmbeddingCache]
) -> EmbeddingCache:
    """The cache that a tower of this name is trained against; raises ContractError if its teacher
    is another."""
    side, _, seed = tower.name.partition("-seed")
    names = {
        "shuffled": ("tuned-seed0", "raw"),
        "tuned": (tower.name,),
        "map": (tower.name,),
        "start": (f"tuned-seed{seed}",),
    }.get(side, (side,))
    fingerprint = TeacherIdentity(**teacher).fingerprint
    fingerprints = {name: cache.fingerprint for name, cache in caches.items()}
    for name in names:
        if fingerprints.get(name) == fingerprint:
            return caches[name]
    raise ContractError(
        f"{tower}: teacher {fingerprint}, expected that of {' or '.join(names)}; "
        f"caches: {fingerprints}"
    )


def training_shards(side: str) -> str:
    """The shards that towers of a side are trained on."""
    if side == "shuffled":
        return "shuffled/train-*.tar"
    if side.endswith("-twins"):  # of scenes.sh
        return "all/twins-*.tar"
    return "all/train-*.tar"


def check_run(tower: Path) -> dict[str, Any]:
    """The shards, caches and seed of a tower's training, from ``runs/NAME/run.json``. Raises
    ContractError if it read other shards than those of its name, or validated on the test's."""
    side, _, seed = tower.name.partition("-seed")
    run = tower.parents[1] / "runs" / tower.name
    config = RunRecord.read(run / RunRecord.FILE).config
    data = config["data"]
    shards = [Path(path) for path in data["path"]]
    used = {
        "shards": [f"{path.parent.name}/{path.name}" for path in shards],
        "seed": config["train"]["seed"],
    }
    expected = {"shards": [training_shards(side)], "seed": int(seed)}
    validation = data["validation"]
    is_validation = Path(validation or "").name.startswith("validation-")
    if used != expected or (validation and not is_validation):
        used["validation"] = validation
        raise ContractError(
            f"{tower} was trained with {used}, expected {expected} and validation shards; {RERUN}"
        )
    return {name: data[name] for name in ("path", "cache", "validation")}
