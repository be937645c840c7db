"""Measure a tower on one suite: recall, or the right caption against its hard negative."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.evaluate.embedding import Dual, EmbeddedPairs, embed_pairs
from llm2clip_plugin.evaluate.listing import ListedSource
from llm2clip_plugin.evaluate.measure import WHOLE, RetrievalConfig, evaluate_retrieval
from llm2clip_plugin.evaluate.suites.registry import Suite


def run_suite(
    suite: Suite,
    source: ListedSource,
    dual: Dual,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig,
    *,
    all_ranks: bool = False,
) -> ScoreFile:
    """Metrics (fractions) and every query's hits; on all ranks if ``all_ranks``."""
    if suite.rule == "pairs":
        options = {"limit": config.limit, "batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
        scores = right_against_wrong(embed_pairs(dual, source, cache, images, **options))
    else:
        report = evaluate_retrieval(dual, source, cache, images, config, all_ranks=all_ranks)
        scores = ScoreFile(
            benchmark="",
            metrics=report.metrics(),
            items=report.items(),
            counts=report.counts,
            notes=[f"left out: {error}" for error in report.pairs.broken],
        )
        if suite.by_language:
            scores = mean_over_parts(scores)
    notes = list(scores.notes)
    if suite.images and scores.counts["images"] != suite.images:
        notes.append(f"{scores.counts['images']} images, the published test set has {suite.images}")
    return dataclasses.replace(scores, benchmark=f"retrieval:{suite.name}", notes=notes)


def mean_over_parts(scores: ScoreFile) -> ScoreFile:
    """The headline becomes the mean over languages, each with its own captions as pool; the whole pool is ``all/``."""
    parts = sorted({key.split("/")[0] for key in scores.metrics if "/" in key} - {"shuffled", "chance"})
    if not parts:
        return scores
    metrics = dict(scores.metrics)
    for name in [key for key in scores.metrics if "/" not in key]:
        metrics[f"{WHOLE}/{name}"] = scores.metrics[name]
        metrics[name] = sum(scores.metrics[f"{part}/{name}"] for part in parts) / len(parts)
    notes = [*scores.notes, f"headline: mean over {len(parts)} languages"]
    return dataclasses.replace(scores, metrics=metrics, notes=notes)


def right_against_wrong(pairs: EmbeddedPairs) -> ScoreFile:
    """SugarCrepe's rule: does the image score its caption above the hard negative? A tie counts one half.

    Metrics: one a group, and ``mean`` over the groups (each counts the same); chance is 0.5.
    """
    score_M = (pairs.image_ND[pairs.owner_M].double() * pairs.text_MD.double()).sum(1)
    sides: dict[str, dict[str, int]] = defaultdict(dict)
    for place, caption in enumerate(pairs.captions):
        identity, _, side = caption.kind.rpartition("/")
        sides[identity][side] = place
    items = []
    for identity, place in sides.items():
        gap = float(score_M[place["right"]] - score_M[place["wrong"]])
        hit = 0.5 if gap == 0 else float(gap > 0)
        cluster = pairs.keys[int(pairs.owner_M[place["right"]])]
        items.append({"id": identity, "score": hit, "cluster": cluster, "part": identity.split("/")[0]})
    groups: dict[str, list[float]] = defaultdict(list)
    for item in items:
        groups[item["part"]].append(item["score"])
    metrics = {group: sum(hits) / len(hits) for group, hits in groups.items()}
    return ScoreFile(
        benchmark="",
        metrics=metrics | {"mean": sum(metrics.values()) / len(metrics)},
        items=items,
        counts={"images": len(pairs.keys), "items": len(items), "left_out": len(pairs.broken)},
        notes=[f"left out: {error}" for error in pairs.broken],
    )
