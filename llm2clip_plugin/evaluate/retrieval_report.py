"""What `llm2clip evaluate` and the evaluation during training report: recall in total and by part, with intervals.

A part is the captions of one kind in one language (``long:en``, ``short:de``), as pool and as queries.

Recall over groups (``group``): if several images show one concept (an emoji in three styles) and have the same
captions, any caption of the concept is correct for its images and any of its images for the captions. Equal captions
of a concept are in the pool, and are queries, once: i2t R@k is over k captions, not over k copies of one.

Shapes: N images, M captions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.embedded_pairs import Dual, EmbeddedPairs, embed_pairs
from llm2clip_plugin.evaluate.retrieval import Retrieval, retrieve, shuffled

ALL = "all"  # the part with every caption


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Ranks of every part, and what identifies their queries."""

    config: RetrievalConfig
    parts: dict[str, Retrieval]  # ALL first
    pairs: EmbeddedPairs
    cluster_N: list[str]  # bootstrap cluster of each image
    control: Retrieval | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """``i2t_r1`` ... over all captions, ``long:en/i2t_r1`` by part, ``shuffled/...`` and ``chance/...``."""
        flat: dict[str, float] = {}
        for name, part in self.parts.items():
            prefix = "" if name == ALL else f"{name}/"
            flat |= {prefix + key: value for key, value in part.metrics(self.config.ks).items()}
        if self.control is not None:
            for name, values in (("shuffled", self.control.metrics), ("chance", self.control.chance)):
                flat |= {f"{name}/{key}": value for key, value in values(self.config.ks).items()}
        return flat

    def items(self) -> list[dict[str, Any]]:
        """One per query: ``id``, ``score`` (hit at the first k), ``cluster``, ``part``, ``side``, ``r1`` ..."""
        out: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            for side, ranks, index in _sides(part):
                hits = [ranks.hits(k).tolist() for k in self.config.ks]
                for row, query in enumerate(index):
                    image, label = self._query(side, query)
                    scores = {f"r{k}": hits[column][row] for column, k in enumerate(self.config.ks)}
                    item = {"id": f"{name}/{side}/{label}", "score": hits[0][row], "cluster": self.cluster_N[image]}
                    out.append(item | {"part": name, "side": side, **scores})
        return out

    def intervals(self, resamples: int = 2000) -> dict[str, Interval]:
        """Clustered bootstrap interval of each of `metrics`, except the control's."""
        out: dict[str, Interval] = {}
        for name, part in self.parts.items():
            prefix = "" if name == ALL else f"{name}/"
            for side, ranks, index in _sides(part):
                clusters = [self.cluster_N[self._query(side, query)[0]] for query in index]
                for k in self.config.ks:
                    out[f"{prefix}{side}_r{k}"] = bootstrap_mean(ranks.hits(k).numpy(), clusters, resamples=resamples)
        return out

    def scores(self) -> ScoreFile:
        """The record that `llm2clip compare` reads, without the names of the benchmark and the model."""
        notes = [f"left out: {error}" for error in self.pairs.broken]
        return ScoreFile(benchmark="", metrics=self.metrics(), items=self.items(), counts=self.counts, notes=notes)

    def _query(self, side: str, query: int) -> tuple[int, str]:
        """The image of a query, and the query's name, which is the same in every run."""
        if side == "i2t":
            return query, self.pairs.keys[query]
        image = int(self.pairs.owner_M[query])
        first = int(torch.searchsorted(self.pairs.owner_M, image))
        return image, f"{self.pairs.keys[image]}#{query - first}"


def _sides(part: Retrieval):
    """(name, ranks, positions of the queries) for each direction."""
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
    """Measure a dual encoder's retrieval on a data source whose captions are in the cache.

    Also for use during training: every submodule keeps its mode (train, eval). ``all_ranks``: every rank of the
    default process group calls this and gets the report; the ranks split the work.
    Raises ValueError if no image is usable, or if samples have no field ``group`` or ``cluster``.
    """
    config = config or RetrievalConfig()
    pairs = embed_pairs(dual, source, cache, images, config, all_ranks=all_ranks, quiet=quiet)
    return report_retrieval(pairs, config, all_ranks=all_ranks, device=next(dual.parameters()).device)


def report_retrieval(
    pairs: EmbeddedPairs, config: RetrievalConfig, *, all_ranks: bool = False, device: torch.device | str = "cpu"
) -> RetrievalReport:
    """Measure retrieval on embedded pairs; ``device``: where scores are computed."""
    image_ND, text_MD = pairs.image_ND.to(device), pairs.text_MD.to(device)
    label_N = pairs.image_labels(config.group)
    label_M = label_N[pairs.owner_M]

    def ranked(image_label_N: Tensor, captions: Tensor) -> Retrieval:
        subset = None if bool(captions.all()) else captions  # all captions need no copy
        return retrieve(image_ND, text_MD, image_label_N, label_M, captions=subset, all_ranks=all_ranks)

    used_M = _distinct_captions(pairs, label_M) if config.group else torch.ones(len(label_M), dtype=torch.bool)
    parts = {ALL: ranked(label_N, used_M)}
    names = [f"{caption.kind}:{caption.language}" for caption in pairs.captions]
    distinct = list(dict.fromkeys(names))
    if config.parts and len(distinct) > 1:
        for name in distinct:
            parts[name] = ranked(label_N, used_M & torch.tensor([other == name for other in names]))
    cluster = config.cluster or config.group
    return RetrievalReport(
        config=config,
        parts=parts,
        pairs=pairs,
        cluster_N=pairs.meta_values(cluster) if cluster else list(pairs.keys),
        control=ranked(shuffled(label_N), used_M) if config.control else None,
        counts={"images": len(pairs.keys), "captions": int(used_M.sum()), "left_out": len(pairs.broken)},
    )


def _distinct_captions(pairs: EmbeddedPairs, label_M: Tensor) -> Tensor:
    """(M,) bool: True for the first of each group's captions with the same text, kind and language."""
    seen: set[tuple[int, Caption]] = set()
    is_first = []
    for caption in zip(label_M.tolist(), pairs.captions, strict=True):
        is_first.append(caption not in seen)
        seen.add(caption)
    return torch.tensor(is_first)
