"""Stage 2's input: captioned images with the cached embeddings of their captions."""

from dataclasses import dataclass

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.digest import cache_digest, source_digest
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.stages.caches import find_cache
from llm2clip_plugin.stages.tower.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Data:
    """Opened sources with their caches, checked against each other."""

    sources: list[Source]
    caches: list[EmbeddingCache]
    validation: Source | None
    validation_cache: EmbeddingCache | None
    clip_caches: list[EmbeddingCache]  # with heads.target clip_text: a CLIP's text features of each source's captions

    @property
    def samples(self) -> int:
        """Training samples of one epoch over all sources: the sum of weight x size."""
        return sum(epoch_draws(list(map(len, self.sources)), [source.config.weight for source in self.sources]))

    @property
    def teacher(self) -> TeacherIdentity:
        """The LLM whose embeddings the caches hold."""
        return self.caches[0].teacher

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        own = {}
        for number, (source, cache) in enumerate(zip(self.sources, self.caches, strict=True), 1):
            own |= {str(number): source_digest(source), f"{number}, its cache": cache_digest(cache)}
        for number, cache in enumerate(self.clip_caches, 1):
            own[f"{number}, its CLIP cache"] = cache_digest(cache)
        if self.validation is not None and self.validation_cache is not None:
            own |= {"validation": source_digest(self.validation)}
            own |= {"validation, its cache": cache_digest(self.validation_cache)}
        return own


def open_data(config: RunConfig) -> Data:
    """Open every source and cache.

    Raises ContractError if two caches have different teachers, or one doesn't fit its data.
    """
    paths = config.data.cache or ("",) * len(config.data.path)
    sources, caches = [], []
    teacher = None
    for item, path in zip(config.data.sources, paths, strict=True):
        source, cache = open_pair(item, path, teacher)
        teacher = cache.teacher
        sources.append(source)
        caches.append(cache)
    check_fields(*sources)
    held_out = config.data.held_out
    pair = open_pair(held_out, config.data.validation_cache, teacher) if held_out else (None, None)
    clip_caches = open_clip_caches(config, sources) if config.heads.target == "clip_text" else []
    return Data(sources=sources, caches=caches, validation=pair[0], validation_cache=pair[1], clip_caches=clip_caches)


def open_clip_caches(config: RunConfig, sources: list[Source]) -> list[EmbeddingCache]:
    """The caches of one CLIP's text features, checked against their sources."""
    caches: list[EmbeddingCache] = []
    for source, path in zip(sources, config.data.clip_cache or ("",) * len(sources), strict=True):
        known = caches[0].fingerprint if caches else None
        cache = EmbeddingCache.open(path or find_cache(source.config, of_clip=True), expect_fingerprint=known)
        if cache.teacher.pooling != PROJECTED or cache.width != config.dual.projection_dim:
            raise ValueError(
                f"--clip-cache {cache.directory} has features of {cache.teacher.llm}, {cache.width} wide; expected the "
                f"text features of the tower's own CLIP, dual.projection_dim {config.dual.projection_dim} wide"
            )
        cache.check(source)
        caches.append(cache)
    return caches


def open_pair(config: SourceConfig, cache_path: str, teacher: TeacherIdentity | None) -> tuple[Source, EmbeddingCache]:
    """A source and its cache, checked against each other and against the teacher of the caches before it."""
    if is_url(config.path) and not cache_path:  # before anything is downloaded
        raise ValueError(
            f"{config.path} is not a local folder; set its embedding cache with --cache DIR "
            "(--validation-cache DIR for the held-out split)"
        )
    source = open_source(config)
    cache = EmbeddingCache.open(
        cache_path or find_cache(config, teacher), expect_fingerprint=teacher.fingerprint if teacher else None
    )
    cache.check(source)
    return source, cache
