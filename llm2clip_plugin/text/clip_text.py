"""The text tower of a CLIP as a caption encoder: the space that ``--heads.target clip_text`` lets an LLM inherit.

``llm2clip embed DATA --llm CLIP`` caches its features as it caches an LLM's embeddings: another teacher, another cache.

Shape letters: N captions, B captions of a batch, T tokens, D width of the features.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.text.device import default_device, fastest_dtype
from llm2clip_plugin.text.encoder import CaptionEncoder, TextEncoder
from llm2clip_plugin.text.files import files_sha256, local_folder
from llm2clip_plugin.text.open_clip_text import OPEN_CLIP_CONFIG, OpenClipTokenizer, load_open_clip_text
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.tokens import PROBE_TEXT
from llm2clip_plugin.vision.convert.checkpoint_files import weight_files
from llm2clip_plugin.vision.families import families

MAY_DIFFER = ("llm", "revision", "max_tokens", "compute_dtype")  # settings of EncoderConfig that apply to a CLIP


def clip_folder(llm: str, revision: str = "") -> Path | None:
    """The folder of an image-text model that has its own text tower; None for anything else.

    Raises ValueError or FileNotFoundError as ``local_folder``.
    """
    if llm and (Path(llm) / OPEN_CLIP_CONFIG).is_file():
        return Path(llm)
    folder = local_folder(llm, revision)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None  # the reader of LLMs says what is wrong
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = {name for family in families().values() if family.image_text_class for name in family.model_types}
    return folder if kind in known and isinstance(config.get("text_config"), dict) else None


class ClipTextEncoder(TextEncoder):
    """The features of captions by a CLIP's own text tower, before normalization, as its images are compared with them.

    ``width``: D. Hugging Face's CLIP, SigLIP and other families with
    an image-text model, and folders in OpenCLIP's format (open_clip_config.json).
    Raises ValueError for a setting of LLMs, which a CLIP does not have.
    """

    def __init__(self, folder: Path, config: EncoderConfig, device: torch.device | str | None = None) -> None:
        default = EncoderConfig()
        for item in dataclasses.fields(config):
            if item.name not in MAY_DIFFER and getattr(config, item.name) != getattr(default, item.name):
                raise ValueError(
                    f"--{item.name.replace('_', '-')} {getattr(config, item.name)} has no effect: {config.llm} is a "
                    "CLIP, whose text tower embeds captions as it was trained to; remove it"
                )
        self.device = torch.device(device) if device is not None else default_device()
        auto = config.compute_dtype == "auto"
        self.dtype = fastest_dtype(self.device) if auto else getattr(torch, config.compute_dtype)
        is_hugging_face = "model_type" in _read(folder / "config.json")
        loaded = _hugging_face(folder) if is_hugging_face else load_open_clip_text(folder)
        self.model: nn.Module = loaded[0].requires_grad_(False).eval().to(self.device, self.dtype)
        self.tokenizer: Any = _tokenizer(folder)
        self.context, self.pads_to_context, self.width = loaded[1:]
        self.config = dataclasses.replace(config, max_tokens=min(config.max_tokens, self.context))
        self.folder = folder

    def identity(self) -> TeacherIdentity:
        probe = hashlib.sha256(json.dumps(self._tokens([PROBE_TEXT])).encode()).hexdigest()
        return TeacherIdentity(
            llm=str(Path(self.config.llm).absolute()) if Path(self.config.llm).is_dir() else self.config.llm,
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
            tokenizer=probe,
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
        return self.context if self.pads_to_context else len(ids)

    @torch.no_grad()
    def embed_tokens(self, rows: Sequence[Sequence[int]], *, query: bool = False) -> Tensor:
        length = max(map(self.padded_length, rows))
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in rows], device=self.device)
        options = {}
        if not self.pads_to_context:  # SigLIP was trained to see its padding
            options["attention_mask"] = torch.tensor(
                [[1] * len(ids) + [0] * (length - len(ids)) for ids in rows], device=self.device
            )
        output = self.model.get_text_features(input_ids=ids_BT, **options)  # type: ignore[operator]
        return (output if isinstance(output, Tensor) else output.pooler_output).float().cpu()


def open_encoder(config: EncoderConfig, device: torch.device | str | None = None) -> TextEncoder:
    """The encoder of captions at ``config.llm``: a CLIP's own text tower, else an LLM."""
    folder = clip_folder(config.llm, config.revision)
    return CaptionEncoder(config, device) if folder is None else ClipTextEncoder(folder, config, device)


def _hugging_face(folder: Path) -> tuple[nn.Module, int, bool, int]:
    """Model, tokens of a context, whether every text is padded to it, width of the features."""
    settings = AutoConfig.from_pretrained(folder)
    family = next(family for family in families().values() if settings.model_type in family.model_types)
    assert family.image_text_class is not None
    with quiet_transformers():
        model, report = family.image_text_class().from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"{folder} is not a complete {type(model).__name__}: {', '.join(missing[:5])} are missing")
    text = settings.text_config
    siglip = settings.model_type.startswith("siglip")
    width = getattr(text, "projection_size", text.hidden_size) if siglip else settings.projection_dim
    return model, text.max_position_embeddings, siglip, width


def _tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer, or that of the open_clip package.

    Raises ValueError without either.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")):
        return AutoTokenizer.from_pretrained(folder)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return OpenClipTokenizer(folder)
    raise ValueError(f"{folder} has no tokenizer; copy tokenizer.json of the same model into it")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
