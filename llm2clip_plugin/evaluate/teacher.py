"""The tower's teacher, for captions that are not cached yet: loaded when it is first needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from llm2clip_plugin.contracts import CacheManifest, ContractError, TeacherIdentity, TowerCard
from llm2clip_plugin.data.cache.reader import EmbeddingCache, differences
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.text.embed import default_cache_folder, embed_source
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.distributed import gather_objects, group_of


class Teacher:
    """Caches of the captions of any data set, by the LLM that the tower's card names.

    ``config``: where its LLM and adapter lie; the card decides everything else, if it names a teacher.
    """

    def __init__(self, card: TowerCard, config: EncoderConfig, device: torch.device, dtype: str = "float16") -> None:
        self.identity = TeacherIdentity(**card.teacher) if card.teacher else None
        self.llm_width = int(card.dual.get("llm_width", 0))
        self.config = config if self.identity is None else encoder_config(self.identity, config)
        self.device = device
        self.dtype = dtype
        self._encoder: CaptionEncoder | None = None

    def cache(self, source: Source, directory: Path | None = None, *, all_ranks: bool = False) -> EmbeddingCache:
        """The cache of ``source``: as it lies there if it is whole, else made now, by all ranks together.

        ``directory``: by default ``embeddings-<fingerprint>`` in the source's folder. Raises ContractError if the LLM
        found is not the tower's teacher, or the directory is another teacher's; FileNotFoundError without the LLM.
        """
        if directory is None:
            directory = default_cache_folder(source.path, self.fingerprint)
        cache = self._whole(source, directory)
        # decided together: a fast rank may have finished its part
        if any(gather_objects(cache is None, group_of(all_ranks))):
            rank, world = (dist.get_rank(), dist.get_world_size()) if all_ranks else (0, 1)
            embed_source(source, self.encoder, directory, self.dtype, rank, world, quiet=rank != 0)
            if all_ranks:
                dist.barrier()
            cache = EmbeddingCache.open(directory, expect_fingerprint=self.fingerprint)
            cache.check(source)
        assert cache is not None
        if self.llm_width and cache.width != self.llm_width:
            raise ContractError(f"{directory} is {cache.width} wide, the tower's adapter takes {self.llm_width}")
        return cache

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint: the card's, or that of the LLM that was named."""
        return (self.identity or self.encoder.identity()).fingerprint

    @property
    def encoder(self) -> CaptionEncoder:
        """The LLM, loaded once, held against the card."""
        if self._encoder is None:
            if not self.config.llm:
                raise ValueError("the tower's card names no teacher; say which LLM embeds captions: --teacher.llm PATH")
            encoder = CaptionEncoder(self.config, self.device)
            found = encoder.identity()
            if self.identity is not None and found.fingerprint != self.identity.fingerprint:
                raise ContractError(
                    f"{self.config.llm} is not the tower's teacher: the tower's "
                    f"{differences(vars(self.identity), found)}; give the right one with --teacher.llm and "
                    "--teacher.adapter"
                )
            self._encoder = encoder
        return self._encoder

    def _whole(self, source: Source, directory: Path) -> EmbeddingCache | None:
        """The cache if it holds every caption of ``source``, else None."""
        if not (directory / CacheManifest.FILE).is_file():
            return None
        try:
            cache = EmbeddingCache.open(directory, expect_fingerprint=self.fingerprint)
            cache.check(source)
        except ContractError:
            return None  # embedding again redoes what is not whole, and refuses another teacher's directory
        return cache


def encoder_config(identity: TeacherIdentity, where: EncoderConfig) -> EncoderConfig:
    """The encoder that a card describes, with the LLM and adapter where ``where`` says they lie.

    Raises ValueError if the card's teacher has an adapter and none is given.
    """
    if identity.adapter_sha256 and not where.adapter:
        raise ValueError(
            f"the tower's teacher is {identity.llm} with an adapter (weights {identity.adapter_sha256[:12]}); "
            "its captions are not cached, so say where the adapter lies: --teacher.adapter DIR"
        )
    return dataclasses.replace(
        where,
        llm=where.llm or identity.llm,
        revision=where.revision or ("" if where.llm else identity.revision),
        attention=identity.attention,
        pooling=identity.pooling,
        layer=identity.layer,
        prompt=identity.prompt,
        chat_template=identity.chat_template,
        include_bos=identity.include_bos,
        max_tokens=identity.max_tokens,
        load_in_4bit=identity.quantization == "nf4",
    )
