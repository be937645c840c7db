"""What a suite can measure: recall, recall averaged over languages, or the caption against its hard negative."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.evaluate.command_line import OpenedTower
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.embedded_pairs import EmbeddedPairs, embed_pairs
from llm2clip_plugin.evaluate.retrieval_report import ALL, report_retrieval

# metrics (fractions) and the score of every query; the last argument: all ranks call it together and split the work
Measure = Callable[[OpenedTower, Source, EmbeddingCache, RetrievalConfig, bool], ScoreFile]


def recall(
    tower: OpenedTower, source: Source, cache: EmbeddingCache, config: RetrievalConfig, all_ranks: bool
) -> ScoreFile:
    """Recall@k in both directions over all captions; see `report_retrieval`."""
    pairs = embed_pairs(tower.dual, source, cache, tower.images, config, all_ranks=all_ranks)
    return report_retrieval(pairs, config, all_ranks=all_ranks, device=tower.device).scores()


def recall_by_language(
    tower: OpenedTower, source: Source, cache: EmbeddingCache, config: RetrievalConfig, all_ranks: bool
) -> ScoreFile:
    """The mean of the languages' recalls, each over its own captions; recall over all captions is ``all/...``."""
    scores = recall(tower, source, cache, config, all_ranks)
    parts = sorted({key.split("/")[0] for key in scores.metrics if "/" in key} - {"shuffled", "chance"})
    if not parts:
        return scores
    metrics = dict(scores.metrics)
    for name in [key for key in scores.metrics if "/" not in key]:
        metrics[f"{ALL}/{name}"] = scores.metrics[name]
        metrics[name] = sum(scores.metrics[f"{part}/{name}"] for part in parts) / len(parts)
    notes = [*scores.notes, f"headline: mean over {len(parts)} languages"]
    return dataclasses.replace(scores, metrics=metrics, notes=notes)


def hard_negatives(
    tower: OpenedTower, source: Source, cache: EmbeddingCache, config: RetrievalConfig, all_ranks: bool
) -> ScoreFile:
    """How often an image scores its caption above the caption's hard negative; see `hard_negative_scores`."""
    config = dataclasses.replace(config, kinds=(), languages=())  # a caption's kind is its item and its side
    return hard_negative_scores(embed_pairs(tower.dual, source, cache, tower.images, config, all_ranks=all_ranks))


def hard_negative_scores(pairs: EmbeddedPairs) -> ScoreFile:
    """Captions of kind ``GROUP/ID/right`` against ``GROUP/ID/wrong`` of the same image; a tie counts one half.

    Metrics: one for each group, and ``mean``, the unweighted mean of the groups; chance is 0.5.
    Source: Hsieh et al., SugarCrepe (2023), section 4.
    """
    score_M = (pairs.image_ND[pairs.owner_M].double() * pairs.text_MD.double()).sum(1)
    place = {caption.kind: position for position, caption in enumerate(pairs.captions)}
    items, groups = [], defaultdict(list)
    for kind, right in place.items():
        item, _, side = kind.rpartition("/")
        if side == "right":
            gap, group = float(score_M[right] - score_M[place[f"{item}/wrong"]]), item.split("/")[0]
            hit = 0.5 if gap == 0 else float(gap > 0)
            groups[group].append(hit)
            items.append({"id": item, "score": hit, "cluster": pairs.keys[int(pairs.owner_M[right])], "part": group})
    metrics = {group: sum(hits) / len(hits) for group, hits in groups.items()}
    return ScoreFile(
        benchmark="",
        metrics=metrics | {"mean": sum(metrics.values()) / len(metrics)},
        items=items,
        counts={"images": len(pairs.keys), "items": len(items), "left_out": len(pairs.broken)},
        notes=[f"left out: {error}" for error in pairs.broken],
    )
