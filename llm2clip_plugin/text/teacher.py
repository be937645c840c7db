"""Who embeds captions: an LLM or a CLIP's own text tower, and the teacher that a tower's card
names.

Importable in LLaVA's environment, where texts cannot be embedded, but cached embeddings can be
encoded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from llm2clip_plugin.contracts import (
    PROJECTED,
    TeacherIdentity,
    TowerCard,
)
from llm2clip_plugin.data.cache import differences
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import files_sha256, sha256_weights
from llm2clip_plugin.text.adapter import adapter_sha256
from llm2clip_plugin.text.clip_text import ClipTextEncoder, clip_folder
from llm2clip_plugin.text.config import IDENTITY_SETTINGS, EncoderConfig
from llm2clip_plugin.text.encoder import (
    CaptionEncoder,
    TextEncoder,
    local_folder,
    weights_sha256,
)
from llm2clip_plugin.vision.directory import fetch_directory, is_local, weight_files
from llm2clip_plugin.vision.dual import LoadedDualEncoder, TextAdapter, load_dual

GIVE_LLM = "pass the LLM with --llm PATH_OR_HUB_ID (in Python: teacher=)"
GIVE_ADAPTER = "pass it with --adapter DIR (in Python: adapter=)"
GIVE_BOTH = "pass it with --llm and --adapter (in Python: teacher= and adapter=)"
GIVE_POST = (
    "pass its post-processing with --post-file (in Python: "
    "teacher=EncoderConfig(post_file=...))"
)


def open_encoder(
    config: EncoderConfig, device: torch.device | str | None = None
) -> TextEncoder:
    """The encoder of captions at ``config.llm``: a CLIP's own text tower, else an LLM."""
    folder = clip_folder(config.llm, config.revision)
    if folder is None:
        return CaptionEncoder(config, device)
    return ClipTextEncoder(folder, config, device)


def load_dual_encoder(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    teacher: str | EncoderConfig = "",
    adapter: str = "",
) -> LoadedDualEncoder:
    """A trained dual encoder for retrieval, from a tower directory or Hub id; in eval mode.

    ``encode_image(pixel_values)`` and ``encode_text(texts)`` give (B, D), L2-normalized, float32;
    ``logit_scale`` is the factor of the logits. Texts are strings, in any language, or (N, W)
    embeddings of the teacher. An imported CLIP has no text adapter: its teacher is its own text
    tower (``teacher=CLIP``), whose features are compared as they are.

    teacher: path or Hub id of the LLM that embeds strings, by default the one that the tower's card
    names; it is loaded by the first call with strings. If the card names none, an EncoderConfig
    says how the LLM embeds. adapter: folder or Hub id of its adapter, by default where the card
    says that it is.

    Raises FileNotFoundError without a card, ValueError if the directory contains only a tower.
    ``encode_text`` raises ValueError or FileNotFoundError if the teacher is not at hand,
    ContractError for another LLM than the tower's.
    """
    dual, card = load_dual(source, dtype=dtype)
    if dual.text_adapter is None:
        dual.config = dataclasses.replace(
            dual.config, llm_width=dual.config.projection_dim, adapter="none"
        )
        dual.text_adapter = TextAdapter(dual.config).eval()
        card = dataclasses.replace(card, dual=dataclasses.asdict(dual.config))
    config = (
        teacher if isinstance(teacher, EncoderConfig) else EncoderConfig(llm=teacher)
    )
    llm = TeacherLLM(
        card, dataclasses.replace(config, adapter=adapter or config.adapter)
    )

    def embed(texts: Sequence[str]) -> torch.Tensor:
        llm.device = llm.device or next(dual.parameters()).device
        return llm.encoder.encode(texts)

    return LoadedDualEncoder(dual, card, embed).eval()


class TeacherLLM:
    """The LLM that a tower's card names: loaded on first use, and compared with the card.

    ``config``: where the LLM and its adapter are, if not where the card says; the card decides
    every other setting.
    """

    def __init__(
        self,
        card: TowerCard,
        config: EncoderConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.llm_width = int(card.dual.get("llm_width", 0))
        self.config = config or EncoderConfig()
        self.device = device
        self.identity = teacher_of(card)

    @property
    def known_identity(self) -> TeacherIdentity:
        """The teacher's identity, from the card, else from the LLM."""
        return self.identity or self.encoder.identity()

    def check_given(self) -> None:
        """Compare the LLM and the adapter that ``config`` names with the card, by the hashes of
        their files: where all texts are cached, they are not loaded. Raises ContractError for
        others."""
        llm = self.config.llm
        adapter = self.config.adapter
        identity = self.identity
        if identity is None or not (llm or adapter):
            return
        wrong = []
        if adapter:
            actual = adapter_sha256(fetch_directory(adapter))
            if actual != identity.adapter_sha256:
                wrong.append(
                    f"adapter_sha256 {identity.adapter_sha256!r} != {actual!r}"
                )
        if llm and (is_local(llm) or llm != identity.llm):
            folder = local_folder(llm, self.config.revision)
            if identity.pooling == PROJECTED:
                weights = files_sha256(weight_files(folder))
            else:
                weights = weights_sha256(folder)
            if weights != identity.weights_sha256:
                wrong.append(
                    f"weights_sha256 {identity.weights_sha256!r} != {weights!r}"
                )
        if wrong:
            names = " with ".join(filter(None, (llm, adapter)))
            raise ContractError(
                f"{names} is not the tower's teacher: {'; '.join(wrong)}; omit --llm and --adapter"
            )

    @cached_property
    def encoder(self) -> TextEncoder:
        """The LLM. Raises FileNotFoundError or ValueError if it is not at hand, ContractError if it
        is another one."""
        if self.identity is None and not self.config.llm:
            raise ValueError(
                f"the tower's card names no teacher, which embeds texts; {GIVE_LLM}"
            )
        config = self.config
        if self.identity is not None:
            config = encoder_config(self.identity, self.config)
        try:
            # of the caller; its loading takes gradients to see what attends to what
            with torch.inference_mode(False):
                encoder = open_encoder(config, self.device)
        except FileNotFoundError as error:
            if self.config.llm or str(config.llm) not in str(error):
                raise
            raise FileNotFoundError(
                f"the tower's teacher cannot be loaded: {error}; {GIVE_LLM}"
            ) from error
        loaded = encoder.identity()
        if self.identity is not None and not self.identity.agrees_with(loaded):
            changed = differences(vars(self.identity), loaded)
            advice = GIVE_BOTH
            if self.identity.post and not loaded.post:
                advice = GIVE_POST
            raise ContractError(
                f"{config.llm} is not the tower's teacher: {changed}; {advice}"
            )
        return encoder


def teacher_of(card: TowerCard) -> TeacherIdentity | None:
    """The teacher that a tower's card names; None if it names none. Raises ContractError for a
    damaged entry."""
    try:
        return TeacherIdentity(**card.teacher) if card.teacher else None
    except TypeError as error:
        raise ContractError(
            f"{card.FILE}: its teacher has unknown or missing settings ({error})"
        ) from error


def encoder_config(identity: TeacherIdentity, config: EncoderConfig) -> EncoderConfig:
    """The settings of the card's teacher; the LLM, the adapter and the post-processing are where
    ``config`` says, else where the card does. Raises ValueError if the place of one is unknown, or
    empty, ContractError if another post-processing is there."""
    llm = config.llm or identity.llm
    revision = config.revision or ("" if config.llm else identity.revision)
    if identity.pooling == PROJECTED:  # a CLIP's text tower has no other settings
        max_tokens = identity.max_tokens
        dtype = config.compute_dtype
        return EncoderConfig(
            llm=llm, revision=revision, max_tokens=max_tokens, compute_dtype=dtype
        )
    adapter = config.adapter or identity.adapter
    where = ""  # that an adapter is not found
    if not adapter and identity.adapter_sha256:
        where = "at a place that the card does not name"
    elif is_local(adapter) and not config.adapter and not Path(adapter).is_dir():
        where = f"no longer at {adapter}"
    if where:
        raise ValueError(
            f"the adapter of the tower's teacher {llm} is {where}; {GIVE_ADAPTER}"
        )
    if not config.post_file:
        check_post(identity)
    is_mean = identity.pooling == "mean" and identity.attention == "bidirectional"
    settings = {name: getattr(identity, name) for name in IDENTITY_SETTINGS}
    return dataclasses.replace(
        config,
        llm=llm,
        preset="mean" if is_mean else "",
        revision=revision,
        adapter=adapter,
        post_file=config.post_file or identity.post_file,
        load_in_4bit=identity.quantization == "nf4",
        **settings,
    )


def check_post(identity: TeacherIdentity) -> None:
    """Raise ValueError if the post-processing is no longer where the teacher's record says,
    ContractError if it is another one."""
    path = Path(identity.post_file)
    if not identity.post_file:  # in the folder of the adapter or the LLM
        return
    if not path.is_file():
        raise ValueError(
            f"the post-processing of the tower's teacher {identity.llm} is no longer at {path}; "
            f"{GIVE_POST}"
        )
    actual = sha256_weights(path)
    if actual != identity.post:
        raise ContractError(
            f"{path} has SHA-256 {actual}, but the tower's card records {identity.post!r}: copy "
            f"the file again, or {GIVE_POST}"
        )
