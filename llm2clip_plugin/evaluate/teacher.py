"""The tower's teacher: the cache of its embeddings, and the LLM itself for captions that are not cached yet."""

from pathlib import Path

import torch

from llm2clip_plugin.contracts import CacheManifest, ContractError, TowerCard
from llm2clip_plugin.data.cache.reader import EmbeddingCache, differences
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.text.embed import default_cache_folder, embed_source
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.teacher import TeacherLLM, embed_command, teacher_of
from llm2clip_plugin.train.distributed import barrier, gather_objects, group_of, rank, world_size


def open_teacher_cache(
    card: TowerCard, directory: str, data: SourceConfig, *, any_teacher: bool = False
) -> EmbeddingCache:
    """The existing cache of the tower's teacher; ``directory`` "" is the default folder for ``data``.

    Raises FileNotFoundError without a cache, ValueError if the tower's card names no teacher and no directory is
    given, ContractError for a cache of another width or of another teacher (allowed with ``any_teacher``).
    """
    teacher = teacher_of(card)
    if not directory and teacher is None:
        raise ValueError("the tower's card names no teacher, so there is no default cache; pass --cache DIR")
    folder = Path(directory) if directory or teacher is None else default_cache_folder(data.path, teacher.fingerprint)
    create = embed_command(data.path, teacher)
    if not (folder / CacheManifest.FILE).is_file():
        raise FileNotFoundError(f"no embedding cache at {folder}; create it: {create}")
    cache = EmbeddingCache.open(folder, expect_width=int(card.dual.get("llm_width", 0)) or None)
    if teacher is not None and cache.fingerprint != teacher.fingerprint and not any_teacher:
        raise ContractError(
            f"the cache {folder} was not created with the tower's teacher: "
            f"{differences(cache.manifest.teacher, teacher)} (fingerprints {cache.fingerprint[:12]} and "
            f"{teacher.fingerprint[:12]}); embed the captions with the tower's teacher, or pass --any-teacher: {create}"
        )
    return cache


class Teacher(TeacherLLM):
    """Opens or creates the embedding cache of any data source, with the LLM that the tower's card names."""

    def __init__(self, card: TowerCard, config: EncoderConfig, device: torch.device, dtype: str = "float16") -> None:
        super().__init__(card, config, device)
        self.dtype = dtype

    def cache(self, source: Source, directory: Path | None = None, *, all_ranks: bool = False) -> EmbeddingCache:
        """The cache of ``source``: opened if it is complete, otherwise embedded now, by all ranks together.

        ``directory``: by default ``embeddings-<fingerprint>`` in the source's folder. Raises ContractError if the LLM
        is not the tower's teacher or the directory belongs to another one; FileNotFoundError without the LLM.
        """
        if directory is None:
            directory = default_cache_folder(source.path, self.fingerprint)
        group = group_of(all_ranks)
        cache = self._open_complete(source, directory)
        # decided together: a fast rank may have finished its part
        if any(gather_objects(cache is None, group)) or cache is None:
            number, ranks = rank(group), world_size(group)
            embed_source(source, self.encoder, directory, self.dtype, number, ranks, quiet=number != 0)
            if all_ranks:
                barrier()
            cache = self._open(source, directory)
        if self.llm_width and cache.width != self.llm_width:
            raise ContractError(
                f"{directory} has width {cache.width}, but the tower's text adapter expects {self.llm_width}"
            )
        return cache

    def _open(self, source: Source, directory: Path) -> EmbeddingCache:
        cache = EmbeddingCache.open(directory, expect_fingerprint=self.fingerprint)
        cache.check(source)
        return cache

    def _open_complete(self, source: Source, directory: Path) -> EmbeddingCache | None:
        """The cache if it has every caption of ``source``, else None."""
        if not (directory / CacheManifest.FILE).is_file():
            return None
        try:
            return self._open(source, directory)
        except ContractError:
            return None  # embedding redoes incomplete shards, and refuses another teacher's directory
