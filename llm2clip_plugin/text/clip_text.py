"""A CLIP's own text tower as the teacher: ``llm2clip embed DATA --llm CLIP`` caches a CLIP's
features as it caches an LLM's embeddings, for ``--heads.target clip_text``.

Shape letters: B captions of a batch, T tokens, D width of the features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity
from llm2clip_plugin.hashes import files_sha256, sha256_text
from llm2clip_plugin.pretrained import KNOWN, check_vocabulary, open_pretrained
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import TextEncoder, absolute, local_folder
from llm2clip_plugin.text.identity import config_sha256, tokenizer_sha256
from llm2clip_plugin.text.llm import PROBE_TEXT, load_whole
from llm2clip_plugin.vision.directory import read_json, weight_files
from llm2clip_plugin.vision.families import families, family_of_type

# settings of EncoderConfig that apply to a CLIP
MAY_DIFFER = ("llm", "revision", "max_tokens", "compute_dtype")
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def clip_folder(llm: str, revision: str = "") -> Path | None:
    """The folder of an image-text model that has its own text tower, None for another; raises as
    ``local_folder``."""
    folder = local_folder(llm, revision)
    config = read_json(folder / "config.json")
    model_types: set[str] = set()
    for family in families().values():
        if family.image_text_class:
            model_types.update(family.model_types)
    has_text_tower = isinstance(config.get("text_config"), dict)
    if has_text_tower and config.get("model_type") in model_types:
        return folder
    return None


class ClipTextEncoder(TextEncoder):
    """The features of captions by the own text tower of a CLIP, SigLIP or another family with an
    image-text model, not normalized, as its images are compared with them. Raises ValueError for a
    setting of LLMs."""

    def __init__(
        self,
        folder: Path,
        config: EncoderConfig,
        device: torch.device | str | None = None,
    ) -> None:
        default = vars(EncoderConfig())
        not_allowed: list[str] = []
        for name, value in vars(config).items():
            if value != default[name] and name not in MAY_DIFFER:
                not_allowed.append(name)
        if not_allowed:
            raise ValueError(
                f"{config.llm} is a CLIP, which is read as it was trained; "
                f"omit {', '.join(not_allowed)}"
            )
        super().__init__(config, device)
        settings = open_pretrained(AutoConfig, folder, fix=KNOWN)
        self._config_sha256 = config_sha256(settings.text_config)
        family = family_of_type(settings.model_type, where=str(folder))
        image_text_class: Any = family.image_text_class
        model = load_whole(image_text_class(), folder, dtype=torch.float32)
        self.model: Any = model.requires_grad_(False).eval().to(self.device, self.dtype)
        text = settings.text_config
        self.context = text.max_position_embeddings
        # it was trained to see its padding
        self.pads_to_context = settings.model_type.startswith("siglip")
        siglip_width = getattr(text, "projection_size", text.hidden_size)
        self.width = siglip_width if self.pads_to_context else settings.projection_dim
        # transformers makes one without words
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise ValueError(
                f"{folder} has no tokenizer; copy tokenizer.json of the same model into it"
            )
        self.tokenizer: Any = open_pretrained(AutoTokenizer, folder, fix=KNOWN)
        (framing,) = self._tokens(["a"])
        check_vocabulary(self.tokenizer, text.vocab_size, folder, framing)
        self._tokenizer_sha256 = tokenizer_sha256(self.tokenizer)
        max_tokens = min(config.max_tokens, self.context)
        self.config = dataclasses.replace(config, max_tokens=max_tokens)
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
            config_sha256=self._config_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
        )

    def tokenize(
        self, captions: Sequence[str], *, query: bool = False
    ) -> list[list[int]]:
        limit = self.config.max_tokens
        rows: list[list[int]] = []
        for ids in self._tokens(captions):
            if len(ids) > limit:
                self.count_truncated += 1
                # the last token marks the end, and is where a CLIP reads its feature
                ids = [*ids[: limit - 1], ids[-1]]
            rows.append(ids)
        return rows

    def _tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids with those of begin and end, not truncated."""
        if not captions:
            return []
        rows = self.tokenizer(list(captions), verbose=False)["input_ids"]
        return [list(ids) for ids in rows]

    def padded_length(self, ids: Sequence[int]) -> int:
        if self.pads_to_context:
            return self.context
        return min(super().padded_length(ids), self.context)

    @torch.no_grad()
    def embed_tokens(
        self, rows: Sequence[Sequence[int]], *, query: bool = False
    ) -> Tensor:
        length = max(map(self.padded_length, rows))
        pad = self.tokenizer.pad_token_id
        padded: list[list[int]] = []
        for ids in rows:
            padded.append([*ids, *[pad] * (length - len(ids))])
        ids_BT = torch.tensor(padded, device=self.device)
        options = {}
        if not self.pads_to_context:
            length_B1 = torch.tensor([[len(ids)] for ids in rows], device=self.device)
            has_token_BT = torch.arange(length, device=self.device) < length_B1
            options["attention_mask"] = has_token_BT.long()
        output = self.model.get_text_features(input_ids=ids_BT, **options)
        features_BW = output if isinstance(output, Tensor) else output.pooler_output
        return features_BW.float().cpu()
