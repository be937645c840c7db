#!/usr/bin/env python3
"""The quickstart's report: every exported tower measured on data that training never saw, as tables.

    report.py --data quickstart-output/data --output quickstart-output/default
    report.py --data quickstart-output/data --teachers     prints the table of the teachers alone

Reads ``all/`` and ``cache/`` below ``--data`` and ``towers/<teacher>-seed<n>/`` below ``--output``; writes
``headline.json`` there. A tower is measured with the cache of its name, and refused if its records name other shards,
caches or adapters. Seeds that are not finished are left out.

Each style is a gallery of its own with one drawing, and one caption of each kind, per concept, so that chance is
1 / concepts both ways. The measure is the mean reciprocal rank: every query counts by the rank of its right answer. The
same queries are compared in pairs, as by ``llm2clip compare``; families of emoji are drawn as a whole, because their
members are right or wrong together, and p is adjusted for the number of claims (Holm).

Shapes: N images, M captions, Q queries, W width of an embedding.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from inputs import RANDOM
from scipy.stats import nhypergeom

from llava_integration.benchmarks.benchmark import mean_statistic
from llava_integration.compare.statistics import compare, holm, pair
from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.bootstrap import estimate, fraction, p_value, spread
from llm2clip_plugin.contracts import CacheManifest, RunRecord, TeacherIdentity, write_text
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.retrieval import QueryRanks, RetrievalReport, evaluate_retrieval
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.encoder import adapter_sha256
from llm2clip_plugin.vision.export import markdown_table
from llm2clip_plugin.vision.towers import preprocessor_config

SETS = {"test": ("noto", "twemoji", "fluent"), "unseen style": ("openmoji",)}  # name -> styles
TESTS = {  # row of the table -> (set, kind of caption); "other": names in every language except English
    "test families, long captions": ("test", "long"),
    "test families, names": ("test", "short"),
    "unseen style (openmoji), long captions": ("unseen style", "long"),
    "names in languages never trained on": ("test", "other"),
}
SIDES = {"i2t": "image → caption", "t2i": "caption → image"}
RETRIEVAL = RetrievalConfig(kinds=("short", "long"), group="concept", cluster="family", ks=(1, 10))
TEACHER_TESTS = {  # (kind of query, kind of answer); "other": names in every language except English
    "name → keywords without its words": ("short", "keywords"),
    "name → long caption": ("short", "long"),
    "names in languages never trained on → English": ("other", "short"),
}
HEADLINE = (  # chosen before the seeds were run; the other claims are listed below them, significant or not
    "tower: names in languages never trained on, caption → image",
    "teacher: names in languages never trained on → English",
    "teacher: name → keywords without its words",
)
TEACHERS = {  # part of a folder's name -> what the tables call it
    "raw": "raw LLM, read well",
    "tuned": "fine-tuned LLM",
    "plain": "raw LLM, as it comes",
    "random": "random embeddings",
    "shuffled": "control: wrong pictures",
}
LEVEL = 0.05  # of the test, after Holm's adjustment
LEGEND = """Mean reciprocal rank of the right answer: 1 if it is always first, .5 if always second; equal scores are in
random order. Training saw no drawing of these families. Galleries are of one style each. ±: standard deviation over
trainings. Difference: the same queries on both sides, 95 % interval over families and, if there are several, trainings.
p: paired test, adjusted for all rows of its table (Holm); alone: significant trainings, each by itself.
"""
AGAIN = "delete it and rerun scripts/quickstart.sh"


class Measured(NamedTuple):
    """The score of every query in one test."""

    scores: np.ndarray  # (Q,) reciprocal ranks
    clusters: list[str]  # Q: the queries' families
    chance: float  # mean of a random order


Rows = dict[str, Measured]  # row of the tables -> its queries
Tests = dict[str, tuple[Mapping[int, Measured], Mapping[int, Measured]]]  # test -> base and new side, by seed
Embeddings = dict[tuple[str, str], dict[str, torch.Tensor]]  # (kind, language) -> concept, each once -> (W,)
Claim = dict[str, Any]  # one test of two teachers on the same queries, over all seeds and for each; as in headline.json


def reciprocal_ranks(ranks: QueryRanks) -> np.ndarray:
    """(Q,) 1 / rank of the best correct item: the expected value, as items of equal score are in random order."""
    wrong_Q, correct_Q = ranks.wrong_equal_Q.numpy(), ranks.correct_equal_Q.numpy()
    ahead_W1 = np.arange(wrong_Q.max() + 1)[:, None]  # of the best correct one, wrong ones of its score
    return (nhypergeom.pmf(ahead_W1, wrong_Q + correct_Q, wrong_Q, 1) / (ranks.higher_Q.numpy() + 1 + ahead_W1)).sum(0)


def measured(galleries: Sequence[tuple[QueryRanks, list[str], int]]) -> Measured:
    """The queries of several galleries: ranks, families, and the number of items, one of them right."""
    ranks, clusters, items = zip(*galleries, strict=True)
    chance = float(np.mean([np.mean(1 / np.arange(1, count + 1)) for count in items]))
    return Measured(np.concatenate(list(map(reciprocal_ranks, ranks))), [*itertools.chain(*clusters)], chance)


def by_name(rows: Mapping[str, Rows]) -> dict[str, dict[int, Rows]]:
    """Of TEACHERS, in its order -> those of its seeds in theirs, from ``NAME-seedN``."""
    seeded = sorted((int(name.rpartition("-seed")[2]), name) for name in rows if "-seed" in name)
    groups = {one: {seed: rows[name] for seed, name in seeded if name.startswith(f"{one}-seed")} for one in TEACHERS}
    return {name: seeds for name, seeds in groups.items() if seeds}


def pair_tests(part: str, rows: Mapping[str, Rows], base: str = "raw") -> Tests:
    """The tests of ``base`` (of TEACHERS) and of the fine-tuned LLM by seed; {} without both. ``rows``: by
    ``NAME-seedN``; ``base`` alone stands for every seed: an LLM without an adapter has none."""
    groups = by_name(rows)
    new = groups.get("tuned", {})
    old = dict.fromkeys(new, rows[base]) if base in rows else groups.get(base, {})
    return {
        f"{part}: {row}": ({s: of[row] for s, of in old.items()}, {s: of[row] for s, of in new.items()})
        for row in (next(iter(old.values()), ()) if new else ())
    }


def make_claims(tests: Tests) -> list[Claim]:
    """A claim for each test, the headline's first, on the seeds that all of them have; [] without one. With several
    seeds, the interval of their mean contains the spread over seeds; that of each seed does not."""
    seeds = sorted(set.intersection(*(set(side) for sides in tests.values() for side in sides))) if tests else []
    if not seeds:
        return []
    total, each, claims = _compare(tests, seeds), {str(seed): _compare(tests, [seed]) for seed in seeds}, []
    for place, (name, (base, new)) in enumerate(tests.items()):
        change = np.sign([new[s].scores - base[s].scores for s in seeds])
        by_seed = {seed: of_seed[place] for seed, of_seed in each.items()}
        claims.append(
            {"name": name, "chance": base[seeds[0]].chance, "queries": change.shape[1]}
            # fractions of the queries, over all seeds, with a higher and a lower score
            | {"better": float(np.mean(change > 0)), "worse": float(np.mean(change < 0))}
            | {"seeds_significant": sum(one["significant"] for one in by_seed.values())}
            | {**total[place], "by_seed": by_seed}
        )
    return sorted(claims, key=lambda one: HEADLINE.index(one["name"]) if one["name"] in HEADLINE else len(HEADLINE))


def _compare(tests: Tests, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The paired comparison of `llm2clip compare` on each test, p adjusted for all of them."""
    found = []
    for sides in tests.values():
        base, new = ([mean_statistic(side[seed].scores.tolist(), scale=1.0) for seed in seeds] for side in sides)
        found.append(compare(pair(base, new, sides[0][seeds[0]].clusters)))
    adjusted = holm([one.p for one in found])
    return [
        {"raw": one.base, "tuned": one.new, "difference": one.difference, "interval": [one.low, one.high]}
        | {"p": one.p, "p_adjusted": p, "significant": bool(p < LEVEL)}
        for one, p in zip(found, adjusted, strict=True)
    ]


def open_sets(data: Path) -> dict[str, list[Source]]:
    """Set -> its samples in each style; the unseen style may be missing."""
    paths = {name: [data / f"test-{style}.tar" for style in styles] for name, styles in SETS.items()}
    present = {name: shards for name, shards in paths.items() if name == "test" or shards[0].is_file()}
    return {name: [open_source(SourceConfig(path=str(path))) for path in shards] for name, shards in present.items()}


def measure_tower(path: Path, sets: Mapping[str, list[Source]], caches: Mapping[str, EmbeddingCache]) -> Rows:
    """Load a tower directory, ``tuned-seed0`` or the like, and measure it on every set, with the cache of its name.
    Raises ContractError if no cache belongs to its teacher."""
    dual, images = load_dual_encoder(path), ImageConfig.from_preprocessor(preprocessor_config(path))
    cache = cache_of(path, dual.card.teacher, caches)
    reports = {
        name: [evaluate_retrieval(dual, source, cache, images, RETRIEVAL, quiet=True) for source in sources]
        for name, sources in sets.items()
    }
    return {
        f"{test}, {title}": tower_queries(reports[of_set], kind, side)
        for test, (of_set, kind) in TESTS.items()
        for side, title in SIDES.items()
        if of_set in reports
    }


def tower_queries(reports: Sequence[RetrievalReport], kind: str, side: str) -> Measured:
    """Every query of one direction, i2t or t2i: of each style, in each of the kind's languages."""
    others = sorted(name for name in reports[0].parts if name.startswith("short:") and name != "short:en")
    galleries = []
    for report, name in itertools.product(reports, others if kind == "other" else [f"{kind}:en"]):
        part = report.parts[name]
        ranks, index_Q = part.sides[side]
        images = index_Q if side == "i2t" else report.pairs.owner_M[index_Q]
        pool = len(part.sides["t2i"][0]) if side == "i2t" else len(report.pairs.keys)
        galleries.append((ranks, [report.cluster_N[image] for image in images.tolist()], pool))
    return measured(galleries)


def measure_teachers(source: Source, caches: Mapping[str, EmbeddingCache]) -> dict[str, Rows]:
    """Each teacher's caption retrieval on the test set, whose captions are the same in every style."""
    samples, found = [source[number] for number in range(len(source))], {}
    family = {sample.meta["concept"]: sample.meta["family"] for sample in samples}
    for name, cache in caches.items():
        embeddings = Embeddings()
        for number, sample in enumerate(samples):
            rows = cache.rows(*source.locate(number), sample.captions, key=sample.key)
            for caption, row in zip(sample.captions, rows, strict=True):
                embeddings.setdefault((caption.kind, caption.language), {}).setdefault(sample.meta["concept"], row)
        found[name] = teacher_queries(embeddings, family)
    return found


def teacher_queries(embeddings: Embeddings, family: Mapping[str, str]) -> Rows:
    """Test -> every query of the teacher's caption retrieval, in each language; ``family`` of each concept."""
    others = sorted(part for part in embeddings if part[0] == "short" and part[1] != "en")
    found = {}
    for test, (asked, answered) in TEACHER_TESTS.items():
        items, galleries = embeddings[answered, "en"], []
        for part in others if asked == "other" else [(asked, "en")]:
            shared = [concept for concept in embeddings[part] if concept in items]
            query, item = (torch.stack([side[concept] for concept in shared]) for side in (embeddings[part], items))
            galleries.append((caption_ranks(query, item)[0], [family[concept] for concept in shared], len(shared)))
        found[test] = measured(galleries)
    return found


def open_caches(data: Path) -> dict[str, EmbeddingCache]:
    """Teacher -> cache below ``data``/cache, checked; incomplete caches are left out. Raises FileNotFoundError if no
    cache is complete, ContractError if one is not what its name says."""
    manifests = sorted((data / "cache").glob(f"*/{CacheManifest.FILE}"))
    paths = [manifest.parent for manifest in manifests if CacheManifest.read(manifest).complete]
    if not paths:
        raise FileNotFoundError(f"no complete embedding cache in {data / 'cache'}; run scripts/quickstart.sh")
    caches = {path.name: EmbeddingCache.open(path) for path in paths}
    for name, cache in caches.items():
        check_cache(data, name, cache)
    return caches


def check_cache(data: Path, name: str, cache: EmbeddingCache) -> None:
    """Raise ContractError for a cache embedded without the adapter of its name, or one of other captions."""
    teacher = cache.manifest.teacher
    used = {"random": teacher["llm"] == RANDOM, "adapter": teacher["adapter_sha256"], "fine-tuned on": []}
    used |= {"pooling": teacher["pooling"], "post": bool(teacher["post"])}
    expected = {"random": name == "random", "adapter": "", "fine-tuned on": []}
    expected |= {"pooling": "mean" if name == "plain" else "last", "post": name == "raw"}
    if name.startswith("tuned-"):
        run = data / "llm" / name.removeprefix("tuned-")
        shards = RunRecord.read(run / RunRecord.FILE).config["pairs"]["data"]
        used["fine-tuned on"] = [Path(shard).name for shard in shards]
        expected |= {"adapter": adapter_sha256(run / "adapter"), "fine-tuned on": ["train-noto.tar"]}
    if used != expected:
        raise ContractError(f"{cache.directory} was embedded with {used}, expected {expected}; {AGAIN}")


def cache_of(tower: Path, teacher: Mapping[str, Any], caches: Mapping[str, EmbeddingCache]) -> EmbeddingCache:
    """The cache that a tower of this name is trained against; raises ContractError if its teacher is another."""
    side = tower.name.partition("-")[0]
    names = {"shuffled": ("tuned-seed0", "raw"), "tuned": (tower.name,)}.get(side, (side,))
    fingerprint, known = TeacherIdentity(**teacher).fingerprint, {name: one.fingerprint for name, one in caches.items()}
    for name in names:
        if known.get(name) == fingerprint:
            return caches[name]
    raise ContractError(f"{tower}: teacher {fingerprint}, expected that of {' or '.join(names)}; caches: {known}")


def check_run(tower: Path) -> dict[str, Any]:
    """The shards, caches and seed of a tower's training, from ``runs/NAME/run.json``. Raises ContractError if it read
    other shards than those of its name, or validated on the test's."""
    side, _, seed = tower.name.partition("-seed")
    config = RunRecord.read(tower.parents[1] / "runs" / tower.name / RunRecord.FILE).config
    data, shards = config["data"], [Path(path) for path in config["data"]["path"]]
    used = {"shards": [f"{path.parent.name}/{path.name}" for path in shards], "seed": config["train"]["seed"]}
    expected = {"shards": [f"{'shuffled' if side == 'shuffled' else 'all'}/train-*.tar"], "seed": int(seed)}
    if used != expected or (data["validation"] and not Path(data["validation"]).name.startswith("validation-")):
        used["validation"] = data["validation"]
        raise ContractError(f"{tower} was trained with {used}, expected {expected} and validation shards; {AGAIN}")
    return {name: data[name] for name in ("path", "cache", "validation")}


def claims_table(claims: Sequence[Claim], base: str = "raw") -> str:
    """A row per claim; those that are not significant say so. ``base``: of TEACHERS."""
    head, rows = (TEACHERS[base], TEACHERS["tuned"], "difference", "p (Holm)", "alone", "chance; random embeddings"), []
    for one in claims:
        raw, tuned = (spread([seed[side] for seed in one["by_seed"].values()]) for side in ("raw", "tuned"))
        strong = "**" * (one["significant"] and one["name"] in HEADLINE)
        alone = f"{one['seeds_significant']} of {len(one['by_seed'])}"
        p = p_value(one["p_adjusted"]) + ", not significant" * (not one["significant"])
        cells = (raw, f"{strong}{tuned}{strong}", estimate(one["difference"], one["interval"]), p, alone)
        random = [spread(one["random"])] if one.get("random") else []
        rows.append((one["name"], *cells, "; ".join([fraction(one["chance"]), *random])))
    return markdown_table(("mean reciprocal rank, test families", *head), rows)


def retrieval_table(towers: Mapping[str, Rows]) -> str:
    """A row per test, a column per teacher."""
    groups, rows = by_name(towers), []
    for name, first in next(iter(towers.values())).items():
        cells = [spread([float(one[name].scores.mean()) for one in seeds.values()]) for seeds in groups.values()]
        rows.append((name, *cells, fraction(first.chance)))
    heads = [f"{TEACHERS[name]} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in groups.items()]
    return markdown_table(("mean reciprocal rank, tower", *heads, "chance"), rows)


def failures(towers: Mapping[str, Rows], claims: Sequence[Claim]) -> list[str]:
    """Requirements that a short run missed: towers above the control, a fine-tuned teacher above the raw one."""
    row = "test families, long captions, image → caption"
    mean = {name: fmean(of[row].scores.mean() for of in seeds.values()) for name, seeds in by_name(towers).items()}
    if "shuffled" not in mean:
        return ["no tower of the control, shuffled-seed0, to compare with; rerun scripts/quickstart.sh"]
    failed = [
        f"{TEACHERS[name]!r} reaches {value:.3f}, not above the control's {mean['shuffled']:.3f}"
        for name, value in mean.items()
        if name not in ("shuffled", "random") and value <= mean["shuffled"]
    ]
    return failed + [claims_table([one]) for one in claims if one["name"] == HEADLINE[2] and one["difference"] <= 0]


def make_report(data: Path, output: Path) -> tuple[list[str], list[str]]:
    """Measure the towers below ``output``, and write ``headline.json`` there. Returns the tables that are
    printed, those of claims last, and how a short run failed."""
    caches, sets = open_caches(data), open_sets(data / "all")
    folders = sorted(path for path in (output / "towers").glob("*-seed*") if path.name.split("-")[0] in TEACHERS)
    if not folders:
        raise FileNotFoundError(f"no exported towers in {output / 'towers'}; run scripts/quickstart.sh")
    inputs = {folder.name: check_run(folder) for folder in folders}
    towers = {folder.name: measure_tower(folder, sets, caches) for folder in folders}
    teachers = measure_teachers(sets["test"][0], caches)
    claims = make_claims(pair_tests("tower", towers) | pair_tests("teacher", teachers))
    over = pair_tests("tower", towers, "plain")
    over_plain = make_claims(over | pair_tests("teacher", teachers, "plain") if over else {})
    headline = [one for one in claims if one["name"] in HEADLINE]
    means = {name: {row: float(one.scores.mean()) for row, one in of.items()} for name, of in towers.items()}
    of_random = [of for name, of in means.items() if name.startswith("random-")]
    for one in claims:  # of teachers: none
        one["random"] = [round(of[row], 5) for of in of_random if (row := one["name"].removeprefix("tower: ")) in of]
    record = {"headline": headline, "others": claims[len(headline) :], "over_plain": over_plain}  # significant or not
    record |= {"table": claims_table(headline), "towers": means, "inputs": inputs}
    write_text(output / "headline.json", json.dumps(record, indent=2))
    tables = [claims_table(rows, base) for rows, base in ((over_plain, "plain"), (claims, "raw")) if rows]
    return [retrieval_table(towers), *tables, LEGEND], failures(towers, claims)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/default"))
    parser.add_argument("--teachers", action="store_true", help="only print the table that needs no tower")
    parser.add_argument("--must-learn", action="store_true", help="fail if a tower is no better than the control")
    options = parser.parse_args()
    try:
        if options.teachers:
            captions = open_sets(options.data / "all")["test"][0]
            claims = make_claims(pair_tests("teacher", measure_teachers(captions, open_caches(options.data))))
            told, failed = [claims_table(claims), LEGEND] if claims else [], []
        else:
            told, failed = make_report(options.data, options.output)
        print("", *told, sep="\n")
        if options.must_learn and failed:
            raise ValueError("nothing was learned: " + "; ".join(failed))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
