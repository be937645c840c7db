"""Image-text retrieval over embeddings: recall@k in both directions, with any number of captions
per image.

Shapes: N images, M captions, D projection dimension.

``i2t``: an image is the query and the captions are ranked, a hit if any correct caption is in the
top k (other code calls this text retrieval). ``t2i``: a caption is the query and the images are
ranked (image retrieval).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenSample, Caption, select_captions
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.features import (
    Dual,
    EmbeddedPairs,
    embed_pairs,
    json_field,
)
from llm2clip_plugin.evaluate.ranks import Retrieval, retrieve
from llm2clip_plugin.hashes import canonical_json, sha256_text

ALL = "all"  # the part with every caption
# samples whose JSON is read before a run, evenly spaced: what fewer lack is found later
LOOKED_AT = 2048


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Ranks of every part, and what identifies their queries."""

    ks: tuple[int, ...]
    parts: dict[str, Retrieval]  # ALL first
    pairs: EmbeddedPairs
    cluster_N: list[str]  # bootstrap cluster of each image
    counts: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """``i2t_r1`` ... over all captions, ``long:en/i2t_r1`` by part."""
        flat: dict[str, float] = {}
        for name, part in self.parts.items():
            prefix = "" if name == ALL else f"{name}/"
            for key, value in part.metrics(self.ks).items():
                flat[prefix + key] = value
        return flat

    def items(self) -> list[dict[str, Any]]:
        """One per query: ``id``, ``score`` (hit at the first k), ``cluster``, ``part``, ``side``,
        ``r1`` ..."""
        owner_M = self.pairs.owner_M
        keys = self.pairs.keys
        # among its image's captions
        number_M = torch.arange(len(owner_M)) - torch.searchsorted(owner_M, owner_M)
        captions = zip(owner_M.tolist(), number_M.tolist(), strict=True)
        named = {  # (image, name that is the same in every run) of each possible query
            "i2t": list(enumerate(keys)),
            "t2i": [(image, f"{keys[image]}#{number}") for image, number in captions],
        }
        out: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            for side, (ranks, index_Q) in part.sides.items():
                hits = {f"r{k}": ranks.hits(k).tolist() for k in self.ks}
                score = f"r{self.ks[0]}"
                for position, query in enumerate(index_Q.tolist()):
                    image, label = named[side][query]
                    item = {
                        "id": f"{name}/{side}/{label}",
                        "score": hits[score][position],
                        "cluster": self.cluster_N[image],
                        "part": name,
                        "side": side,
                    }
                    for metric, values in hits.items():
                        item[metric] = values[position]
                    out.append(item)
        return out

    def data_sha256(self) -> str:
        """Of the images' keys and the captions of each, in an order that does not depend on the
        number of ranks: what the queries are, and what they are to find."""
        pairs: list[list[str]] = []
        owners = self.pairs.owner_M.tolist()
        for owner, caption in zip(owners, self.pairs.captions, strict=True):
            key = self.pairs.keys[owner]
            pairs.append([key, caption.kind, caption.language, caption.text])
        return sha256_text(canonical_json(sorted(pairs)))

    def scores(self) -> ScoreFile:
        """The record that `llm2clip compare` reads, without the names of the benchmark and the
        model."""
        notes = [f"left out: {error}" for error in self.pairs.broken]
        return ScoreFile(
            benchmark="",
            metrics=self.metrics(),
            items=self.items(),
            counts=self.counts,
            notes=notes,
        )


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
    """Measure a dual encoder's retrieval on a data source whose captions are in the cache; every
    submodule keeps its mode (train, eval). ``all_ranks``: every rank of the default process group
    calls this and gets the report.

    Raises ValueError if no image is usable, or if samples have no field ``group`` or ``cluster``.
    """
    config = config or RetrievalConfig()
    pairs = embed_pairs(
        dual, source, cache, images, config, all_ranks=all_ranks, quiet=quiet
    )
    return report_retrieval(
        pairs, config, all_ranks=all_ranks, device=next(dual.parameters()).device
    )


def report_retrieval(
    pairs: EmbeddedPairs,
    config: RetrievalConfig,
    *,
    all_ranks: bool = False,
    device: torch.device | str = "cpu",
) -> RetrievalReport:
    """Measure retrieval on embedded pairs; ``device``: where scores are computed."""
    image_ND = pairs.image_ND.to(device)
    text_MD = pairs.text_MD.to(device)
    label_N = torch.arange(len(pairs.keys))
    if config.group:
        groups = pairs.meta_values(config.group)
        number_of = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        label_N = torch.tensor([number_of[group] for group in groups])
    label_M = label_N[pairs.owner_M]

    def ranked(captions: Tensor) -> Retrieval:
        subset = None if bool(captions.all()) else captions  # all captions need no copy
        return retrieve(
            image_ND, text_MD, label_N, label_M, captions=subset, all_ranks=all_ranks
        )

    used_M = torch.ones(len(label_M), dtype=torch.bool)
    if config.group:
        # the first of each group's captions with the same text, kind and language
        first: dict[tuple[int, Caption], int] = {}
        captions_of_groups = zip(label_M.tolist(), pairs.captions, strict=True)
        for number, caption_of_group in enumerate(captions_of_groups):
            used_M[number] = first.setdefault(caption_of_group, number) == number
    parts = {ALL: ranked(used_M)}
    names = [f"{caption.kind}:{caption.language}" for caption in pairs.captions]
    if len(set(names)) > 1:
        for name in dict.fromkeys(names):
            has_name_M = torch.tensor([other == name for other in names])
            parts[name] = ranked(used_M & has_name_M)
    cluster = config.cluster or config.group
    return RetrievalReport(
        ks=config.ks,
        parts=parts,
        pairs=pairs,
        cluster_N=pairs.meta_values(cluster) if cluster else list(pairs.keys),
        counts={
            "images": len(pairs.keys),
            "captions": int(used_M.sum()),
            "left_out": len(pairs.broken),
        },
    )


def check_measurable(
    source: Source, config: RetrievalConfig, *, option: str = "--"
) -> None:
    """ValueError for kinds and languages without a caption, a field that a sample lacks;
    ``option``: their prefix."""
    images = min(config.limit or len(source), len(source))
    captions = set[Caption]()
    for number in range(0, images, max(1, images // LOOKED_AT)):
        with suppress(BrokenSample):
            sample = source[number]
            captions.update(sample.captions)
            for setting, name in (("group", config.group), ("cluster", config.cluster)):
                if name:
                    before = f"{option}{setting} {name}: {source.path}: "
                    json_field(sample.meta, name, sample.key, before=before)
    if not select_captions(list(captions), config.kinds, config.languages):
        names = {f"{caption.kind}:{caption.language}" for caption in captions}
        available = ", ".join(sorted(names)) or "none"
        kinds = " ".join(config.kinds) or "(any)"
        languages = " ".join(config.languages) or "(any)"
        wanted = f"{option}kinds {kinds} and {option}languages {languages}"
        raise ValueError(
            f"no caption of {source.path} has {wanted}; known: {available}"
        )
