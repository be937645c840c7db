"""What `llm2clip evaluate` and the evaluation during training report: recall whole and by part, with intervals.

A part is the captions of one kind in one language (``long:en``, ``short:de``), pool and queries alike.

Recall over groups (``group``): where several images are of one concept (one emoji drawn in three styles) and bear the
same captions, an image is right with any caption of its concept, and a caption with any image of it. Equal captions
of one concept stand in the pool, and are asked, once; so i2t R@k is over k captions, not over k copies of one.

Shape letters: N images, M captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.embedding import Dual, EmbeddedPairs, embed_pairs
from llm2clip_plugin.evaluate.retrieval import KS, Retrieval, retrieve, shuffled
from llm2clip_plugin.evaluate.retrieval_ranks import TieRule

WHOLE = "all"  # the part that holds every caption


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is measured."""

    kinds: tuple[str, ...] = ()  # captions of these kinds alone; empty: all
    languages: tuple[str, ...] = ()  # captions of these languages alone; empty: all
    group: str = ""  # field of the samples' JSON: images with the same value share their captions; "": each its own
    cluster: str = ""  # field of the samples' JSON: drawn together in the bootstrap; "": the group, or the image
    ties: TieRule = "half"  # half | optimistic | pessimistic | lowest_index_first
    ks: tuple[int, ...] = KS  # a hit is a right item among the k best
    parts: bool = True  # also for the captions of each kind and language by themselves
    control: bool = False  # also with the captions shuffled among the images: must be at chance
    limit: int = 0  # images; 0: all
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Ranks of every part, and what is needed to tell them item by item."""

    config: RetrievalConfig
    parts: dict[str, Retrieval]  # WHOLE first
    pairs: EmbeddedPairs
    cluster_N: list[str]  # bootstrap cluster of each image
    control: Retrieval | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat: ``i2t_r1`` ... over all captions, ``long:en/i2t_r1`` by part, ``shuffled/...`` and ``chance/...``."""
        flat: dict[str, float] = {}
        for name, part in self.parts.items():
            prefix = "" if name == WHOLE else f"{name}/"
            flat |= {prefix + key: value for key, value in part.metrics(self.config.ks, self.config.ties).items()}
        if self.control is not None:
            shuffled_metrics = self.control.metrics(self.config.ks, self.config.ties)
            flat |= {f"shuffled/{key}": value for key, value in shuffled_metrics.items()}
            flat |= {f"chance/{key}": value for key, value in self.control.chance(self.config.ks).items()}
        return flat

    def items(self) -> list[dict[str, Any]]:
        """One query each: ``id``, ``score`` (hit at the first k), ``cluster``, ``part``, ``side``, ``r1`` ..."""
        out: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            for side, ranks, index in _sides(part):
                hits = [ranks.hits(k, self.config.ties).tolist() for k in self.config.ks]
                for row, query in enumerate(index):
                    image, label = self._query(side, query)
                    scores = {f"r{k}": hits[column][row] for column, k in enumerate(self.config.ks)}
                    identity = {"id": f"{name}/{side}/{label}", "score": hits[0][row], "cluster": self.cluster_N[image]}
                    out.append(identity | {"part": name, "side": side, **scores})
        return out

    def intervals(self, resamples: int = 2000) -> dict[str, Interval]:
        """Bootstrap interval of each metric of `metrics` (the control's left out), clustered."""
        out: dict[str, Interval] = {}
        for name, part in self.parts.items():
            prefix = "" if name == WHOLE else f"{name}/"
            for side, ranks, index in _sides(part):
                clusters = [self.cluster_N[self._query(side, query)[0]] for query in index]
                for k in self.config.ks:
                    hits = ranks.hits(k, self.config.ties).numpy()
                    out[f"{prefix}{side}_r{k}"] = bootstrap_mean(hits, clusters, resamples=resamples)
        return out

    def _query(self, side: str, query: int) -> tuple[int, str]:
        """The image of a query, and a name for it that is the same in every run."""
        if side == "i2t":
            return query, self.pairs.keys[query]
        image = int(self.pairs.owner_M[query])
        first = int(torch.searchsorted(self.pairs.owner_M, image))
        return image, f"{self.pairs.keys[image]}#{query - first}"


def _sides(part: Retrieval):
    """(name, ranks, positions of the queries) of both directions."""
    return ("i2t", part.i2t, part.image_index_Q.tolist()), ("t2i", part.t2i, part.caption_index_Q.tolist())


def evaluate_retrieval(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig | None = None,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
) -> RetrievalReport:
    """Measure a dual encoder's retrieval on a data set whose captions are in the cache; in training as well:
    afterwards every part of the model is in the mode (train, eval) that it was in.

    ``all_ranks``: every rank of the default process group calls this, the work is shared, each gets the report.
    Raises ValueError if no image can be used or a field named in the configuration is missing.
    """
    config = config or RetrievalConfig()
    pairs = embed_pairs(
        dual,
        source,
        cache,
        images,
        kinds=config.kinds,
        languages=config.languages,
        limit=config.limit,
        batch=config.batch,
        workers=config.workers,
        all_ranks=all_ranks,
        quiet=quiet,
    )
    return report_retrieval(pairs, config, all_ranks=all_ranks, device=next(dual.parameters()).device)


def report_retrieval(
    pairs: EmbeddedPairs, config: RetrievalConfig, *, all_ranks: bool = False, device: torch.device | str = "cpu"
) -> RetrievalReport:
    """The same for what is embedded already; ``device`` ranks."""
    image_ND, text_MD = pairs.image_ND.to(device), pairs.text_MD.to(device)
    label_N = pairs.image_labels(config.group)
    label_M = label_N[pairs.owner_M]

    def ranked(image_label_N: Tensor, captions: Tensor) -> Retrieval:
        some = None if bool(captions.all()) else captions  # all of them need no copy
        return retrieve(image_ND, text_MD, image_label_N, label_M, captions=some, all_ranks=all_ranks)

    every_M = torch.ones(len(label_M), dtype=torch.bool)
    once_M = _distinct_captions(pairs, label_M) if config.group else every_M
    parts = {WHOLE: ranked(label_N, once_M)}
    names = [f"{caption.kind}:{caption.language}" for caption in pairs.captions]
    distinct = list(dict.fromkeys(names))
    if config.parts and len(distinct) > 1:
        for name in distinct:
            parts[name] = ranked(label_N, once_M & torch.tensor([other == name for other in names]))
    cluster = config.cluster or config.group
    return RetrievalReport(
        config=config,
        parts=parts,
        pairs=pairs,
        cluster_N=pairs.meta_values(cluster) if cluster else list(pairs.keys),
        control=ranked(shuffled(label_N), once_M) if config.control else None,
        counts={"images": len(pairs.keys), "captions": int(once_M.sum()), "left_out": len(pairs.broken)},
    )


def _distinct_captions(pairs: EmbeddedPairs, label_M: Tensor) -> Tensor:
    """(M,) bool: the first of each group's equal captions; one kind and text in one language is one caption."""
    seen: set[tuple[int, Caption]] = set()
    keep = []
    for identity in zip(label_M.tolist(), pairs.captions, strict=True):
        keep.append(identity not in seen)
        seen.add(identity)
    return torch.tensor(keep)
