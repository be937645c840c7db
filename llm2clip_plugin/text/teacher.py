"""Who embeds a caption: an LLM or a CLIP's own text tower, and the teacher that a tower's card names.

``llm2clip embed DATA --llm CLIP`` caches a CLIP's features as it caches an LLM's embeddings, for ``--heads.target
clip_text``. Importable in LLaVA's environment, where texts cannot be embedded, but cached embeddings can be encoded.

Shape letters: B captions of a batch, T tokens, D width of the features.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity, TowerCard, files_sha256, sha256_text
from llm2clip_plugin.data.cache import differences
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.adapter import local_folder
from llm2clip_plugin.text.config import IDENTITY_SETTINGS, EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder, TextEncoder, absolute
from llm2clip_plugin.text.llm import PROBE_TEXT, load_whole
from llm2clip_plugin.vision.directory import is_local, read_json, weight_files
from llm2clip_plugin.vision.dual import LoadedDualEncoder, TextAdapter, load_dual
from llm2clip_plugin.vision.families import families, family_of_type

MAY_DIFFER = ("llm", "revision", "max_tokens", "compute_dtype")  # settings of EncoderConfig that apply to a CLIP
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
GIVE_LLM = "pass the LLM with --llm PATH_OR_HUB_ID (in Python: teacher=)"
GIVE_ADAPTER = "pass it with --adapter DIR (in Python: adapter=)"


def open_encoder(config: EncoderConfig, device: torch.device | str | None = None) -> TextEncoder:
    """The encoder of captions at ``config.llm``: a CLIP's own text tower, else an LLM."""
    folder = clip_folder(config.llm, config.revision)
    return CaptionEncoder(config, device) if folder is None else ClipTextEncoder(folder, config, device)


def clip_folder(llm: str, revision: str = "") -> Path | None:
    """The folder of an image-text model that has its own text tower, None for another; raises as ``local_folder``."""
    folder = local_folder(llm, revision)
    config = read_json(folder / "config.json")
    known = {name for family in families().values() if family.image_text_class for name in family.model_types}
    return folder if config.get("model_type") in known and isinstance(config.get("text_config"), dict) else None


class ClipTextEncoder(TextEncoder):
    """The features of captions by the own text tower of a CLIP, SigLIP or another family with an image-text model, not
    normalized, as its images are compared with them. Raises ValueError for a setting of LLMs."""

    def __init__(self, folder: Path, config: EncoderConfig, device: torch.device | str | None = None) -> None:
        default = vars(EncoderConfig())
        if other := [name for name, value in vars(config).items() if name not in MAY_DIFFER and value != default[name]]:
            raise ValueError(f"{config.llm} is a CLIP, which is read as it was trained; omit {', '.join(other)}")
        super().__init__(config, device)
        settings = AutoConfig.from_pretrained(folder)
        image_text_class: Any = family_of_type(settings.model_type, where=str(folder)).image_text_class
        model = load_whole(image_text_class(), folder, dtype=torch.float32)
        self.model: Any = model.requires_grad_(False).eval().to(self.device, self.dtype)
        text = settings.text_config
        self.context = text.max_position_embeddings
        self.pads_to_context = settings.model_type.startswith("siglip")  # it was trained to see its padding
        siglip_width = getattr(text, "projection_size", text.hidden_size)
        self.width = siglip_width if self.pads_to_context else settings.projection_dim
        if not any((folder / name).is_file() for name in TOKENIZERS):  # transformers makes one without words
            raise ValueError(f"{folder} has no tokenizer; copy tokenizer.json of the same model into it")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.config = dataclasses.replace(config, max_tokens=min(config.max_tokens, self.context))
        self.folder = folder

    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            llm=absolute(self.config.llm),
            revision=self.config.revision,
            weights_sha256=files_sha256(weight_files(self.folder)),
            adapter_sha256="",
            attention="own",
            pooling=PROJECTED,
            layer=-1,
            prompt="",
            chat_template="",
            max_tokens=self.config.max_tokens,
            width=self.width,
            tokenizer=sha256_text(json.dumps(self._tokens([PROBE_TEXT]))),
        )

    def tokenize(self, captions: Sequence[str], *, query: bool = False) -> list[list[int]]:
        rows, limit = self._tokens(captions), self.config.max_tokens
        self.count_truncated += sum(len(ids) > limit for ids in rows)
        # the last token marks the end, and is where a CLIP reads its feature
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]

    def _tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids with those of begin and end, not truncated."""
        return [list(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]] if captions else []

    def padded_length(self, ids: Sequence[int]) -> int:
        return self.context if self.pads_to_context else min(super().padded_length(ids), self.context)

    @torch.no_grad()
    def embed_tokens(self, rows: Sequence[Sequence[int]], *, query: bool = False) -> Tensor:
        length = max(map(self.padded_length, rows))
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in rows], device=self.device)
        options = {}
        if not self.pads_to_context:
            own_B1 = torch.tensor([[len(ids)] for ids in rows], device=self.device)
            options["attention_mask"] = (torch.arange(length, device=self.device) < own_B1).long()
        output = self.model.get_text_features(input_ids=ids_BT, **options)
        return (output if isinstance(output, Tensor) else output.pooler_output).float().cpu()


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
    by the first call with strings. If the card names none, an EncoderConfig says how the LLM embeds. adapter: folder or
    Hub id of its adapter, by default where the card says that it is.

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
    """

    def __init__(
        self, card: TowerCard, config: EncoderConfig | None = None, device: torch.device | None = None
    ) -> None:
        self.llm_width = int(card.dual.get("llm_width", 0))
        self.config = config or EncoderConfig()
        self.device = device
        self.identity = teacher_of(card)

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint, from the card, else from the LLM."""
        return (self.identity or self.encoder.identity()).fingerprint

    @cached_property
    def encoder(self) -> TextEncoder:
        """The LLM. Raises FileNotFoundError or ValueError if it is not at hand, ContractError if it is another one."""
        if self.identity is None and not self.config.llm:
            raise ValueError(f"the tower's card names no teacher, which embeds texts; {GIVE_LLM}")
        config = self.config if self.identity is None else encoder_config(self.identity, self.config)
        try:
            with torch.inference_mode(False):  # of the caller; its loading takes gradients to see what attends to what
                encoder = open_encoder(config, self.device)
        except FileNotFoundError as error:
            if self.config.llm or str(config.llm) not in str(error):
                raise
            raise FileNotFoundError(f"the tower's teacher cannot be loaded: {error}; {GIVE_LLM}") from error
        loaded = encoder.identity()
        if self.identity is not None and loaded.fingerprint != self.identity.fingerprint:
            told = f"{config.llm} is not the tower's teacher: {differences(vars(self.identity), loaded)}"
            raise ContractError(f"{told}; pass it with --llm and --adapter (in Python: teacher= and adapter=)")
        return encoder


def teacher_of(card: TowerCard) -> TeacherIdentity | None:
    """The teacher that a tower's card names; None if it names none. Raises ContractError for a damaged entry."""
    try:
        return TeacherIdentity(**card.teacher) if card.teacher else None
    except TypeError as error:
        raise ContractError(f"{card.FILE}: its teacher has unknown or missing settings ({error})") from error


def encoder_config(identity: TeacherIdentity, config: EncoderConfig) -> EncoderConfig:
    """The settings of the card's teacher; the LLM and the adapter are where ``config`` says, else where the card does.
    Raises ValueError if the adapter's place is unknown, or empty."""
    llm = config.llm or identity.llm
    revision = config.revision or ("" if config.llm else identity.revision)
    if identity.pooling == PROJECTED:  # a CLIP's text tower has no other settings
        max_tokens, dtype = identity.max_tokens, config.compute_dtype
        return EncoderConfig(llm=llm, revision=revision, max_tokens=max_tokens, compute_dtype=dtype)
    adapter = config.adapter or identity.adapter
    lost = is_local(adapter) and not Path(adapter).is_dir() if adapter else bool(identity.adapter_sha256)
    if lost and not config.adapter:
        where = (adapter and f"no longer at {adapter}") or "at a place that the card does not name"
        raise ValueError(f"the adapter of the tower's teacher {llm} is {where}; {GIVE_ADAPTER}")
    return dataclasses.replace(
        config,
        llm=llm,
        preset="mean" if (identity.pooling, identity.attention) == ("mean", "bidirectional") else "",
        revision=revision,
        adapter=adapter,
        load_in_4bit=identity.quantization == "nf4",
        **{name: getattr(identity, name) for name in IDENTITY_SETTINGS},
    )
