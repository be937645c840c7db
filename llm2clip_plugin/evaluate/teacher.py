"""The tower's teacher: the cache of its embeddings, and the LLM itself for captions that are not cached yet."""

import dataclasses
from pathlib import Path

import torch

from llm2clip_plugin.contracts import CacheManifest, ContractError, TeacherIdentity, TowerCard
from llm2clip_plugin.data.cache.reader import EmbeddingCache, differences
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.text.embed import default_cache_folder, embed_source
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.distributed import barrier, gather_objects, group_of, rank, world_size


def open_teacher_cache(card: TowerCard, directory: str, data_path: str, *, any_teacher: bool = False) -> EmbeddingCache:
    """The existing cache of the tower's teacher; ``directory`` "" is the default folder for ``data_path``.

    Raises FileNotFoundError without a cache, ValueError if the tower's card names no teacher and no directory is
    given, ContractError for a cache of another width or of another teacher (allowed with ``any_teacher``).
    """
    teacher = TeacherIdentity(**card.teacher) if card.teacher else None
    if not directory and teacher is None:
        raise ValueError("the tower's card names no teacher, so there is no default cache; pass --cache DIR")
    folder = Path(directory) if directory or teacher is None else default_cache_folder(data_path, teacher.fingerprint)
    if not (folder / CacheManifest.FILE).is_file():
        llm = teacher.llm if teacher else "LLM"
        raise FileNotFoundError(f"no embedding cache at {folder}; create it: llm2clip embed {data_path} --llm {llm}")
    cache = EmbeddingCache.open(folder, expect_width=int(card.dual.get("llm_width", 0)) or None)
    if teacher is not None and cache.fingerprint != teacher.fingerprint and not any_teacher:
        raise ContractError(
            f"the cache {folder} was not created with the tower's teacher: "
            f"{differences(cache.manifest.teacher, teacher)} (fingerprints {cache.fingerprint[:12]} and "
            f"{teacher.fingerprint[:12]}); embed the captions with the tower's teacher, or pass --any-teacher"
        )
    return cache


class Teacher:
    """Opens or creates the embedding cache of any data source, with the LLM that the tower's card names.

    ``config``: where the LLM and its adapter are; if the card names a teacher, it decides every other setting.
    """

    def __init__(self, card: TowerCard, config: EncoderConfig, device: torch.device, dtype: str = "float16") -> None:
        self.identity = TeacherIdentity(**card.teacher) if card.teacher else None
        self.llm_width = int(card.dual.get("llm_width", 0))
        self.config = config if self.identity is None else encoder_config(self.identity, config)
        self.device = device
        self.dtype = dtype
        self._encoder: CaptionEncoder | None = None

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

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint, from the card, else from the LLM."""
        return (self.identity or self.encoder.identity()).fingerprint

    @property
    def encoder(self) -> CaptionEncoder:
        """The LLM, loaded on first use and compared with the card."""
        if self._encoder is None:
            if not self.config.llm:
                raise ValueError(
                    "the tower's card names no teacher; pass the LLM that embeds captions with --teacher.llm PATH"
                )
            encoder = CaptionEncoder(self.config, self.device)
            loaded = encoder.identity()
            if self.identity is not None and loaded.fingerprint != self.identity.fingerprint:
                raise ContractError(
                    f"{self.config.llm} is not the tower's teacher: {differences(vars(self.identity), loaded)}; "
                    "pass the correct one with --teacher.llm and --teacher.adapter"
                )
            self._encoder = encoder
        return self._encoder

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


def encoder_config(identity: TeacherIdentity, config: EncoderConfig) -> EncoderConfig:
    """The settings of the card's teacher, with the LLM and adapter that ``config`` locates.

    Raises ValueError if the teacher has an adapter and ``config`` names none.
    """
    if identity.adapter_sha256 and not config.adapter:
        raise ValueError(
            f"the tower's teacher is {identity.llm} with an adapter (weights {identity.adapter_sha256[:12]}), which is "
            "needed to embed captions that are not cached; pass it with --teacher.adapter DIR"
        )
    settings = ("attention", "pooling", "layer", "prompt", "chat_template", "include_bos", "max_tokens")
    return dataclasses.replace(
        config,
        llm=config.llm or identity.llm,
        revision=config.revision or ("" if config.llm else identity.revision),
        load_in_4bit=identity.quantization == "nf4",
        **{name: getattr(identity, name) for name in settings},
    )
