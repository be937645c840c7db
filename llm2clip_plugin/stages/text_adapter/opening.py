"""Captions with both caches: an LLM's embeddings, and the text features of the tower's own CLIP."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache, cache_digest, source_digest
from llm2clip_plugin.data.remote import is_url
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.data.samples import select_captions
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.tars import data_folder
from llm2clip_plugin.options import command
from llm2clip_plugin.stages.run import caches_next_to, find_cache
from llm2clip_plugin.stages.text_adapter.config import AdapterConfig

SCORED = 4000  # captions of the held-out split that scores are of


@dataclass(frozen=True, kw_only=True)
class Captions:
    """A source and its two caches, each checked against it."""

    source: Source
    cache: EmbeddingCache
    clip_cache: EmbeddingCache


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads."""

    training: list[Captions]
    held_out: Captions | None

    @property
    def samples(self) -> int:
        """Samples of one epoch over all sources: the sum of weight x size."""
        sources = [item.source for item in self.training]
        return sum(epoch_draws(list(map(len, sources)), [source.config.weight for source in sources]))

    @property
    def teacher(self) -> TeacherIdentity:
        """The LLM."""
        return self.training[0].cache.teacher

    @property
    def clip(self) -> TeacherIdentity:
        """The CLIP's text tower."""
        return self.training[0].clip_cache.teacher

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        named = {str(number): item for number, item in enumerate(self.training, 1)}
        named |= {"validation": self.held_out} if self.held_out else {}
        digests = {}
        for name, item in named.items():
            digests |= {name: source_digest(item.source), f"{name}, its cache": cache_digest(item.cache)}
            digests[f"{name}, its CLIP cache"] = cache_digest(item.clip_cache)
        return digests


def open_data(config: AdapterConfig) -> Data:
    """Open every source with its caches.

    Raises FileNotFoundError for a missing cache, ValueError for one of the wrong kind, ContractError if two differ in
    their teacher, or one doesn't fit its data.
    """
    data, training = config.data, []
    caches, clip_caches = (paths or ("",) * len(data.path) for paths in (data.cache, data.clip_cache))
    for item, cache, clip_cache in zip(data.sources, caches, clip_caches, strict=True):
        training.append(_open(item, cache, clip_cache, training[0] if training else None))
    check_fields(*(captions.source for captions in training))
    held_out = None
    if data.validation:
        source = SourceConfig(path=data.validation, **vars(data.read))
        held_out = _open(source, data.validation_cache, data.validation_clip_cache, training[0])
    return Data(training=training, held_out=held_out)


def _open(config: SourceConfig, cache: str, clip_cache: str, first: Captions | None) -> Captions:
    if is_url(config.path) and not (cache and clip_cache):
        raise ValueError(f"{config.path} is not a local folder; set its caches with --cache DIR and --clip-cache DIR")
    source = open_source(config)
    opened = []
    for of_clip, path in ((False, cache or find_cache(config)), (True, clip_cache or find_clip_cache(config))):
        known = None if first is None else (first.clip_cache if of_clip else first.cache)
        one = EmbeddingCache.open(path, expect_fingerprint=known.fingerprint if known else None)
        if (one.teacher.pooling == PROJECTED) is not of_clip:
            kinds = ("of a CLIP's text tower", "of an LLM")
            option = "--clip-cache" if of_clip else "--cache"
            raise ValueError(
                f"{option} {path} is {kinds[of_clip]} ({one.teacher.llm}), expected one {kinds[not of_clip]}"
            )
        one.check(source)
        opened.append(one)
    return Captions(source=source, cache=opened[0], clip_cache=opened[1])


def find_clip_cache(source: SourceConfig) -> str:
    """The only ``embeddings-*`` folder of a CLIP next to the data.

    Raises FileNotFoundError if there is none, ValueError if there are several.
    """
    folder = data_folder(source.path)
    found = caches_next_to(Path(folder), of_clip=True)
    if not found:
        create = command("embed", source.path, "--llm", "CLIP")
        raise FileNotFoundError(f"no cache of a CLIP's text features in {folder}; create it: {create}")
    if len(found) > 1:
        raise ValueError(f"{folder} contains the caches {', '.join(found)} of CLIPs; choose one with --clip-cache")
    return found[0]


def held_out_rows(captions: Captions) -> tuple[Tensor, Tensor]:
    """(N, W) embeddings and (N, D) normalized CLIP features of distinct captions, the first of up to SCORED samples.

    Raises ValueError for fewer than 3.
    """
    source, texts = captions.source, {}
    for number in range(0, len(source), max(1, -(-len(source) // SCORED))):
        _, chosen = source.captions(number)
        chosen = select_captions(chosen, source.config.kinds, source.config.languages)
        if chosen and chosen[0].text not in texts:
            where = source.locate(number)
            texts[chosen[0].text] = [
                cache.rows(*where, chosen[:1])[0] for cache in (captions.cache, captions.clip_cache)
            ]
    if len(texts) < 3:
        raise ValueError(f"{source.path} has {len(texts)} distinct captions; scores need at least 3")
    embeddings, targets = (torch.stack(column) for column in zip(*texts.values(), strict=True))
    return embeddings, F.normalize(targets, dim=-1)
