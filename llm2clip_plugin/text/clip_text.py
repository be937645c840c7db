"""The text tower of a CLIP as a caption encoder: the space that ``--heads.target clip_text`` lets an LLM inherit.

``llm2clip embed DATA --llm CLIP`` caches its features as it caches an LLM's embeddings: another teacher, another cache.

Shape letters: B captions of a batch, T tokens, D width of the features.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from llm2clip_plugin.console import quiet_transformers
from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.adapter import files_sha256, local_folder
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder, TextEncoder
from llm2clip_plugin.text.llm import default_device, fastest_dtype, refuse_incomplete
from llm2clip_plugin.text.tokens import PROBE_TEXT
from llm2clip_plugin.vision.checkpoint import lift_model_cfg, read_tensors, section, weight_files
from llm2clip_plugin.vision.convert.common import TensorNames, depth, require
from llm2clip_plugin.vision.directory import read_json
from llm2clip_plugin.vision.families import families

MAY_DIFFER = ("llm", "revision", "max_tokens", "compute_dtype")  # settings of EncoderConfig that apply to a CLIP
OPEN_CLIP_CONFIG = "open_clip_config.json"
# settings of text_cfg that make it another tower, and the values with which it is the one below
PLAIN = {
    "pool_type": "argmax",
    "no_causal_mask": False,
    "embed_cls": False,
    "hf_model_name": None,
    "proj_type": "linear",
}


def open_encoder(config: EncoderConfig, device: torch.device | str | None = None) -> TextEncoder:
    """The encoder of captions at ``config.llm``: a CLIP's own text tower, else an LLM."""
    folder = clip_folder(config.llm, config.revision)
    return CaptionEncoder(config, device) if folder is None else ClipTextEncoder(folder, config, device)


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

    Hugging Face's CLIP, SigLIP and other families with an image-text model, and folders in OpenCLIP's format
    (open_clip_config.json). Raises ValueError for a setting of LLMs, which a CLIP does not have.
    """

    def __init__(self, folder: Path, config: EncoderConfig, device: torch.device | str | None = None) -> None:
        default = vars(EncoderConfig())
        if other := [name for name, value in vars(config).items() if name not in MAY_DIFFER and value != default[name]]:
            raise ValueError(
                f"{config.llm} is a CLIP, which embeds captions as it was trained to; omit {', '.join(other)}"
            )
        self.device = torch.device(device) if device is not None else default_device()
        auto = config.compute_dtype == "auto"
        self.dtype = fastest_dtype(self.device) if auto else getattr(torch, config.compute_dtype)
        own = folder / "config.json"
        is_hugging_face = own.is_file() and "model_type" in read_json(own)
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
        output: Any = getattr(self.model, "get_text_features", self.model)(input_ids=ids_BT, **options)
        if not isinstance(output, Tensor):
            output = output.text_embeds if "text_embeds" in output else output.pooler_output
        return output.float().cpu()


def _hugging_face(folder: Path) -> tuple[nn.Module, int, bool, int]:
    """Model, tokens of a context, whether every text is padded to it, width of the features."""
    settings = AutoConfig.from_pretrained(folder)
    family = next(family for family in families().values() if settings.model_type in family.model_types)
    assert family.image_text_class is not None
    with quiet_transformers():
        model, report = family.image_text_class().from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    refuse_incomplete(model, report, folder)
    text = settings.text_config
    siglip = settings.model_type.startswith("siglip")
    width = getattr(text, "projection_size", text.hidden_size) if siglip else settings.projection_dim
    return model, text.max_position_embeddings, siglip, width


def load_open_clip_text(folder: Path) -> tuple[nn.Module, int, bool, int]:
    """The text tower of a folder with open_clip_config.json; tokens of a context, False, width of the features.

    Raises ValueError for a text tower that is not CLIP's, ContractError for missing or misshapen tensors.
    """
    config = lift_model_cfg(read_json(folder / OPEN_CLIP_CONFIG))
    text = section(config, "text_cfg", where=OPEN_CLIP_CONFIG)
    if other := [f"{name} {text[name]!r}" for name, value in PLAIN.items() if text.get(name, value) != value]:
        raise ValueError(f"{folder}: the text tower has {', '.join(other)}; supported is CLIP's own")
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state |= read_tensors(file)
    prefix = "text." if "text.token_embedding.weight" in state else ""
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    require(tensors, "token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight", first)
    vocabulary, width = tensors["token_embedding.weight"].shape
    context = len(tensors["positional_embedding"])
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=len(tensors[first]),
            num_hidden_layers=depth(tensors, "transformer.resblocks."),
            num_attention_heads=int(text.get("heads", width // 64)),
            max_position_embeddings=context,
            hidden_act="quick_gelu" if config.get("quick_gelu") else "gelu",
            projection_dim=tensors["text_projection"].shape[1],
            eos_token_id=2,  # the feature is read at the largest id, as OpenCLIP does
        )
    )
    theirs, _ = _names(model).to_ours(tensors)
    theirs["text_projection.weight"] = tensors["text_projection"].T
    own = model.state_dict()
    shapes, expected = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (theirs, own))
    wrong = {name for name, _ in shapes.items() ^ expected.items()}
    if wrong := sorted(name for name in wrong if not name.endswith("position_ids")):
        raise ContractError(f"{folder}: tensors of the text tower are missing or misshapen: {', '.join(wrong[:5])}")
    model.load_state_dict(theirs, strict=False)
    return model, context, False, tensors["text_projection"].shape[1]


def _names(model: nn.Module) -> TensorNames:
    """OpenCLIP's names and the model's, which begin with text_model. in every version of transformers but not all."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    return TensorNames(
        prefixes=("", prefix),
        outside={
            "token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.": "final_layer_norm.",
        },
        blocks=("transformer.resblocks.", "encoder.layers."),
        inside={
            "ln_1.": "layer_norm1.",
            "ln_2.": "layer_norm2.",
            "attn.out_proj.": "self_attn.out_proj.",
            "mlp.c_fc.": "mlp.fc1.",
            "mlp.c_proj.": "mlp.fc2.",
        },
        fused=("attn.in_proj_", "self_attn.{}_proj."),
    )


def _tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer, or that of the open_clip package.

    Raises ValueError without either.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")):
        return AutoTokenizer.from_pretrained(folder)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return OpenClipTokenizer(folder)
    raise ValueError(f"{folder} has no tokenizer; copy tokenizer.json of the same model into it")


class OpenClipTokenizer:
    """CLIP's byte-pair encoding from the open_clip package, for a folder without a tokenizer of its own."""

    pad_token_id = 0

    def __init__(self, folder: Path) -> None:
        try:
            from open_clip.tokenizer import SimpleTokenizer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"{folder} has no tokenizer: copy tokenizer.json of openai/clip-vit-base-patch32 into it, or "
                "`pip install open_clip_torch`, which contains CLIP's"
            ) from error
        self._tokenizer = SimpleTokenizer()

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        """Token ids with those of begin and end, as Hugging Face's tokenizers return them."""
        ours = self._tokenizer
        return {"input_ids": [[ours.sot_token_id, *ours.encode(text), ours.eot_token_id] for text in texts]}
