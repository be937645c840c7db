"""A tower's teacher in Python: the LLM (or CLIP) that the tower's card names, for texts that no cache holds.

Importable in LLaVA's environment, where texts cannot be embedded, but cached embeddings can be encoded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity, TowerCard
from llm2clip_plugin.data.cache import differences
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.options import command
from llm2clip_plugin.text.clip_text import open_encoder
from llm2clip_plugin.text.config import CARD_SETTINGS, EncoderConfig
from llm2clip_plugin.text.encoder import TextEncoder
from llm2clip_plugin.vision.directory import is_local
from llm2clip_plugin.vision.dual import LoadedDualEncoder, TextAdapter, load_dual

IDENTITY_SETTINGS = tuple(name for name in CARD_SETTINGS if name != "query_prompt")
GIVE_LLM = "pass the LLM with --llm PATH_OR_HUB_ID (in Python: teacher=)"
GIVE_ADAPTER = "pass it with --adapter DIR (in Python: adapter=)"


def load_dual_encoder(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    teacher: str | EncoderConfig = "",
    adapter: str = "",
) -> LoadedDualEncoder:
    """A trained dual encoder for retrieval, from a tower directory or Hub id; in eval mode.

    ``encode_image(pixel_values)`` and ``encode_text(texts)`` give (B, D), L2-normalized, float32; ``logit_scale`` is
    the factor of the logits. Texts are strings, in any language, or (N, W) embeddings of the teacher. An imported CLIP
    has no text adapter: its teacher is its own text tower (``teacher=CLIP``), whose features are compared as they are.

    teacher: path or Hub id of the LLM that embeds strings, by default the one that the tower's card names; it is loaded
    by the first call with strings, onto the tower's device. If the card names none, an EncoderConfig says how the LLM
    embeds. adapter: folder or Hub id of its adapter, by default where the card says that it is.

    Raises FileNotFoundError without a card, ValueError if the directory contains only a tower. ``encode_text`` raises
    ValueError or FileNotFoundError if the teacher is not at hand, ContractError for another LLM than the tower's.
    """
    dual, card = load_dual(source, dtype=dtype)
    if dual.text_adapter is None:
        dual.config = dataclasses.replace(dual.config, llm_width=dual.config.projection_dim, adapter="none")
        dual.text_adapter = TextAdapter(dual.config).eval()
        card = dataclasses.replace(card, dual=dataclasses.asdict(dual.config))
    config = teacher if isinstance(teacher, EncoderConfig) else EncoderConfig(llm=teacher)
    llm = TeacherLLM(card, dataclasses.replace(config, adapter=adapter or config.adapter))

    def embed(texts: Sequence[str]) -> torch.Tensor:
        llm.device = llm.device or next(dual.parameters()).device
        return llm.encoder.encode(texts)

    return LoadedDualEncoder(dual, card, embed).eval()


class TeacherLLM:
    """The LLM that a tower's card names: loaded on first use, and compared with the card.

    ``config``: where the LLM and its adapter are, if not where the card says; the card decides every other setting.
    ``device``: None for the accelerator, if there is one.
    """

    def __init__(
        self, card: TowerCard, config: EncoderConfig | None = None, device: torch.device | None = None
    ) -> None:
        self.card = card
        self.llm_width = int(card.dual.get("llm_width", 0))
        self.config = config or EncoderConfig()
        self.device = device
        self._encoder: TextEncoder | None = None

    @cached_property
    def identity(self) -> TeacherIdentity | None:
        """The teacher that the card names."""
        return teacher_of(self.card)

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint, from the card, else from the LLM."""
        return (self.identity or self.encoder.identity()).fingerprint

    @property
    def encoder(self) -> TextEncoder:
        """The LLM. Raises FileNotFoundError or ValueError if it is not at hand, ContractError if it is another one."""
        if self._encoder is None:
            self._encoder = self._load()
        return self._encoder

    def _load(self) -> TextEncoder:
        if self.identity is None and not self.config.llm:
            raise ValueError(f"the tower's card names no teacher, which embeds texts; {GIVE_LLM}")
        config = self.config if self.identity is None else encoder_config(self.identity, self.config)

        try:
            encoder = open_encoder(config, self.device)
        except FileNotFoundError as error:
            if self.config.llm or str(config.llm) not in str(error):
                raise
            raise FileNotFoundError(f"the tower's teacher cannot be loaded: {error}; {GIVE_LLM}") from error
        loaded = encoder.identity()
        if self.identity is not None and loaded.fingerprint != self.identity.fingerprint:
            raise ContractError(
                f"{config.llm} is not the tower's teacher: {differences(vars(self.identity), loaded)}; "
                "pass the correct one with --llm and --adapter (in Python: teacher= and adapter=)"
            )
        if self.llm_width and encoder.width != self.llm_width:
            raise ContractError(
                f"{config.llm} gives embeddings of width {encoder.width}, but the tower's text adapter expects "
                f"{self.llm_width}; {GIVE_LLM}"
            )
        return encoder


def teacher_of(card: TowerCard) -> TeacherIdentity | None:
    """The teacher that a tower's card names; None if it names none. Raises ContractError for a damaged entry."""
    try:
        return TeacherIdentity(**card.teacher) if card.teacher else None
    except TypeError as error:
        raise ContractError(f"{card.FILE}: its teacher has unknown or missing settings ({error})") from error


def encoder_config(identity: TeacherIdentity, config: EncoderConfig) -> EncoderConfig:
    """The settings of the card's teacher; the LLM and the adapter are where ``config`` says, else where the card does.

    Raises ValueError if the teacher has an adapter whose place is unknown, or where none is any more.
    """
    if identity.pooling == PROJECTED:  # a CLIP's text tower has no other settings
        return EncoderConfig(
            llm=config.llm or identity.llm,
            revision=config.revision or ("" if config.llm else identity.revision),
            max_tokens=identity.max_tokens,
            compute_dtype=config.compute_dtype,
        )
    adapter = config.adapter or identity.adapter
    if identity.adapter_sha256 and not adapter:
        raise ValueError(
            f"the tower's teacher is {identity.llm} with an adapter (weights {identity.adapter_sha256[:12]}), which is "
            f"needed to embed texts that are not cached, and the card does not say where it is; {GIVE_ADAPTER}"
        )
    if not config.adapter and adapter and is_local(adapter) and not Path(adapter).is_dir():
        raise ValueError(f"the adapter of the tower's teacher is no longer at {adapter}; {GIVE_ADAPTER}")
    return dataclasses.replace(
        config,
        llm=config.llm or identity.llm,
        revision=config.revision or ("" if config.llm else identity.revision),
        adapter=adapter,
        load_in_4bit=identity.quantization == "nf4",
        **{name: getattr(identity, name) for name in IDENTITY_SETTINGS},
    )


def embed_command(path: str, identity: TeacherIdentity | None) -> str:
    """The command that creates the cache of ``path`` with a teacher, as far as one is known."""
    words = ["embed", path, "--llm", "PATH_OR_HUB_ID" if identity is None else identity.llm]
    if identity is not None and identity.adapter_sha256:
        words += ["--adapter", identity.adapter or "ADAPTER_FOLDER"]
    return command(*words)
