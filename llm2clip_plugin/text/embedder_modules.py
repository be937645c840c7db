"""Modules of an embedder that sentence-transformers does not have: batches of pictures and texts,
captions as the LLM was trained to read them, the text adapter, means over patches.

This file and ``frames.py`` are saved with an exported embedder, which is opened with
``trust_remote_code=True``; neither needs llm2clip-plugin. That trust is not passed on to the LLM.
Shapes: B rows, T tokens, W width, K removed components.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sentence_transformers.base.modality import infer_modality, is_image_url_or_path
from sentence_transformers.sentence_transformer.modules import (
    Module,
    Router,
    Transformer,
)
from torch import Tensor, nn

from llm2clip_plugin.text.frames import Frame, build_frame, tokenize

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
SAMPLES = 64  # of a weight file, which tell a fine-tuned LLM from its base
SAMPLE_BYTES = 4096
BATCH_ROWS = "rows"  # of a part of a batch: its places in the batch


def open_picture(item: Any) -> Any:
    """A picture, its path or its bytes as an image in RGB, also of {"image": it}; anything else as
    it is. Transparency is dropped, not blended with a background.

    Raises ValueError for damaged pictures, FileNotFoundError for a ``Path`` that is not there.
    """
    if isinstance(item, dict) and set(item) == {"image"}:
        item = item["image"]
    is_path = isinstance(item, Path)
    if isinstance(item, str) and is_image_url_or_path(item):
        is_path = not item.startswith(("data:", "http://", "https://"))
    if isinstance(item, Image.Image):
        source: Any = item
        name = f"a picture of {item.width} x {item.height} pixels"
    elif is_path:
        source = item
        name = str(item)
    elif isinstance(item, (bytes, bytearray)):
        source = BytesIO(item)
        name = f"a picture of {len(item)} bytes"
    else:
        return item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            return in_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture at {name}") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        Warning,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def in_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, as in training: a gray one of 16 bits as viewers show it, for PIL's own
    conversion makes nearly all of it white. Raises ValueError for 32 bits a pixel."""
    # before Pillow 11, a PNG of 16 bits had the mode of 32
    is_png_of_16_bits = (image.mode, image.format) == ("I", "PNG")
    if image.mode.startswith("I;16") or is_png_of_16_bits:
        first_8_bits = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(first_8_bits).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel, expected 8 or 16")
    return image.convert("RGB")


def text_of(item: Any) -> str:
    """A text, also of {"text": it}, which is not taken for a path; ValueError if it is blank."""
    text = item["text"] if isinstance(item, dict) else item
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a text is {text!r}; expected a string that is not blank")
    return text


class PictureTextRouter(Router):
    """Pictures to the route "image", texts to "text", also of one batch. Pictures may be paths and
    bytes, too."""

    @property
    def modalities(self) -> list[Any]:
        """ "message" is what sentence-transformers calls a batch of several modalities."""
        return [*super().modalities, "message"]

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        task: str | None = None,
        modality: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As Router's; of a mixed batch the features of each modality, named MODALITY:FEATURE."""
        opened = [open_picture(item) for item in inputs]
        kinds: list[Any] = [infer_modality(item) for item in opened]
        for row, kind in enumerate(kinds):
            if kind not in self.sub_modules:
                raise ValueError(
                    f"cannot embed {kind!r}; give texts, or pictures, each by itself"
                )
            if kind == "text":
                opened[row] = text_of(opened[row])
        options = {"prompt": prompt, "task": task, **kwargs}
        if len(set(kinds)) == 1:
            return super().preprocess(opened, modality=kinds[0], **options)
        features: dict[str, Any] = {}
        for kind in sorted(set(kinds)):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            part = super().preprocess(
                [opened[row] for row in rows], modality=kind, **options
            )
            part[BATCH_ROWS] = torch.tensor(rows)
            for name, value in part.items():
                features[f"{kind}:{name}"] = value
        return features

    def forward(
        self,
        features: dict[str, Any],
        task: Any = None,
        modality: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As Router's; each module gets embeddings in the dtype of its weights."""
        kinds = [
            kind for kind in self.sub_modules if f"{kind}:{BATCH_ROWS}" in features
        ]
        if not kinds:
            kind = modality or features.get("modality") or self.default_route
            return self.embed(str(kind), features)
        rows = []
        embeddings = []
        for kind in kinds:
            part = {}
            for name, value in features.items():
                if name.startswith(f"{kind}:"):
                    part[name.removeprefix(f"{kind}:")] = value
            rows.append(part.pop(BATCH_ROWS))
            embeddings.append(self.embed(kind, part)["sentence_embedding"])
        order = torch.cat(rows).argsort()
        return {**features, "sentence_embedding": torch.cat(embeddings)[order]}

    def embed(self, route: str, features: dict[str, Any]) -> dict[str, Any]:
        """The features after the modules of a route."""
        modules: Any = self.sub_modules[route]
        for module in modules:
            weight = next(module.parameters(), None)
            if weight is not None and "sentence_embedding" in features:
                embedding = features["sentence_embedding"].to(weight.dtype)
                features = {**features, "sentence_embedding": embedding}
            features = module(features)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """As Router's; classes of this file are recorded by their names in the folder."""
        super().save(output_path, *args, **kwargs)
        path = Path(output_path, self.config_file_name)
        body = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in body["types"].items():
            if kind.startswith("transformers_modules."):
                body["types"][name] = ".".join(kind.split(".")[-2:])
        path.write_text(json.dumps(body, indent=4), encoding="utf-8")
        for name in body["structure"]["image"][
            :1
        ]:  # Transformer forgets how pictures are resized
            settings = Path(output_path, name, Transformer.config_file_name)
            read = json.loads(settings.read_text(encoding="utf-8"))
            read["processor_kwargs"] = {"backend": "pil"}
            settings.write_text(json.dumps(read, indent=4), encoding="utf-8")


class Saved(Module):
    """A module with weights, saved as sentence-transformers' own."""

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **_: Any
    ) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Any:
        names = ("token", "cache_folder", "revision", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        model = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **hub))
        return cls.load_torch_weights(
            model_name_or_path, subfolder=subfolder, model=model, **hub
        )


class ResidualMLP(nn.Module):
    """``x + down(gelu(up(norm(x))))``."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x_BW: Tensor) -> Tensor:
        return x_BW + self.down(F.gelu(self.up(self.norm(x_BW))))


class CaptionAdapter(Saved):
    """Embeddings of captions: centered, without removed components, L2-normalized, scaled, then
    residual MLPs; what is not configured is left out."""

    config_keys: ClassVar[list[str]] = [
        "width",
        "center",
        "removed",
        "normalize",
        "factor",
        "blocks",
        "expansion",
    ]

    def __init__(
        self,
        width: int,
        *,
        center: bool = False,
        removed: int = 0,
        normalize: bool = False,
        factor: float = 1.0,
        blocks: int = 0,
        expansion: int = 1,
    ) -> None:
        super().__init__()
        self.width = width
        self.center = center
        self.removed = removed
        self.normalize = normalize
        self.factor = factor
        self.blocks = blocks
        self.expansion = expansion
        if center:
            self.register_buffer("mean", torch.zeros(width))
        if removed:
            self.register_buffer("directions", torch.zeros(width, removed))  # (W, K)
        self.mlps: Any = nn.ModuleList(
            ResidualMLP(width, expansion) for _ in range(blocks)
        )

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        x_BW = features["sentence_embedding"].float()
        if self.center:
            x_BW = x_BW - self.mean.float()
        if self.removed:
            directions_WK = self.directions.float()
            x_BW = x_BW - x_BW @ directions_WK @ directions_WK.T
        if self.normalize:
            x_BW = F.normalize(x_BW, dim=-1)
        x_BW = x_BW * self.factor
        for mlp in self.mlps:
            x_BW = mlp(x_BW.to(mlp.up.weight.dtype))
        return {**features, "sentence_embedding": x_BW}

    def get_embedding_dimension(self) -> int:
        return self.width


class PatchPooling(Saved):
    """The class token, the mean of the patches, or both, of a tower's last state, which may need
    its norm first."""

    config_keys: ClassVar[list[str]] = ["width", "pool", "first_patch", "norm_eps"]

    def __init__(
        self, width: int, pool: str, first_patch: int = 0, norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.pool = pool  # cls | mean | cls_mean
        self.first_patch = first_patch
        self.norm_eps = norm_eps  # None: no norm
        self.norm = (
            nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)
        )

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens_BTW = self.norm(features["token_embeddings"])
        patches_BTW = tokens_BTW[:, self.first_patch :]
        # of pictures in their own aspect
        mask_BT = features.get("pixel_attention_mask")
        if mask_BT is None:
            mean_BW = patches_BTW.mean(dim=1)
        else:
            weight_BT1 = mask_BT.unsqueeze(-1).to(patches_BTW)
            mean_BW = (patches_BTW * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
        pooled = {"cls": tokens_BTW[:, 0], "mean": mean_BW}
        parts = [pooled[name] for name in self.pool.split("_")]
        return {**features, "sentence_embedding": torch.cat(parts, dim=-1)}

    def get_embedding_dimension(self) -> int:
        return self.width * len(self.pool.split("_"))


def weights_sample(folder: Path) -> str:
    """Hash of the sizes and of samples of an LLM's weight files; "" without weights."""
    paths: list[Path] = []
    for pattern in WEIGHTS:
        paths = paths or sorted(folder.glob(pattern))
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(size * number // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if paths else ""


def llm_folder(llm: str, revision: str, expected: str, *, where: Path) -> Path:
    """The folder of the LLM that ``where`` names, downloaded if it is on the Hub. Raises ValueError
    if it is not at hand, or has other weights than those that it was exported with."""
    advice = f'set "llm" in {where} to the folder or Hub id of the LLM that it was exported with'
    folder = where.parent / llm if llm.startswith(("./", "../")) else Path(llm)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        skipped = ["*.pth", "*.gguf", "original/*", "*.onnx"]
        try:
            folder = Path(
                snapshot_download(
                    llm, revision=revision or None, ignore_patterns=skipped
                )
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the LLM {llm!r} is not at hand ({reason}); {advice}"
            ) from error
    actual = weights_sample(folder)
    if actual != expected:
        raise ValueError(
            f"{folder} has other weights than the LLM of this embedder; {advice}"
        )
    return folder


class Captions(Transformer):
    """An LLM that reads captions as it was trained to: prompt and chat template around them, which
    are not pooled, the first blocks alone, bidirectional attention, an adapter. It is frozen.

    ``llm``: where it is, if not in this module's folder. ``reading``: prompt, chat_template,
    include_bos, max_tokens, blocks (-1: all, and the final norm), causal, revision, weights (a
    hash), trust_remote_code (whether the LLM's own code runs, whoever opens the embedder).
    """

    config_keys: ClassVar[list[str]] = [*Transformer.config_keys, "llm", "reading"]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        reading: dict[str, Any],
        llm: str = "",
        **kwargs: Any,
    ) -> None:
        # not yet by nn.Module's __setattr__; _load_config needs it
        object.__setattr__(self, "reading", reading)
        options = ("model_kwargs", "processor_kwargs", "config_kwargs")
        where_from = kwargs["config_kwargs"]
        inside = where_from.get("subfolder", "")
        names = ("token", "revision", "local_files_only")
        hub = {name: where_from[name] for name in names if name in where_from}
        hub["cache_folder"] = where_from.get("cache_dir")
        adapter = None
        if llm:
            home = Path(self.load_dir_path(model_name_or_path, inside, **hub) or "")
            expected = reading["weights"]
            where = home / self.config_file_name
            model_name_or_path = str(
                llm_folder(llm, reading["revision"], expected, where=where)
            )
            for name in options:
                kwargs[name] = {**kwargs[name], "subfolder": "", "revision": None}
            if (home / "adapter_config.json").is_file():
                adapter = home
        trusts = {"trust_remote_code": reading["trust_remote_code"]}
        for name in options:
            kwargs[name] = {**kwargs[name], **trusts}
        super().__init__(model_name_or_path, **kwargs)
        self.reading = reading
        self.llm = llm
        self.use_text_model()
        self.keep_blocks(reading["blocks"])
        if not reading["causal"]:
            for module in self.model.modules():  # some families' own flag decides
                if isinstance(getattr(module, "is_causal", None), bool):
                    module.is_causal = False  # type: ignore[assignment]
        if adapter is not None:
            self.attach(adapter)
        self.model.requires_grad_(False).eval()
        self.max_seq_length = reading["max_tokens"]
        self.frames: dict[str, Frame] = {}

    def _load_config(self, *args: Any, **kwargs: Any) -> Any:
        config, is_peft = super()._load_config(*args, **kwargs)
        for settings in (config, config.get_text_config()):
            settings.is_causal = self.reading["causal"]
        return config, is_peft

    def use_text_model(self) -> None:
        """The language part of a multimodal model."""
        if hasattr(self.model, "language_model"):
            self.model = self.model.language_model

    def keep_blocks(self, count: int) -> None:
        """Drop the blocks above ``count``, and the final norm."""
        if count >= 0:
            self.model.layers = self.model.layers[:count]
            self.model.norm = nn.Identity()
            self.model.config.num_hidden_layers = count

    def attach(self, folder: Path) -> None:
        """Merge the adapter in float32. In half precision it stays apart: a small change added to
        a weight may round to nothing."""
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(
            self.model, str(folder), autocast_adapter_dtype=False
        )
        if self.model.dtype == torch.float32:
            self.model = wrapped.merge_and_unload()
        else:
            self.model = wrapped

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token ids padded on the right, and which tokens are pooled. ``prompt``: in place of the
        one that it was trained with."""
        text = self.reading["prompt"] if prompt is None else prompt
        if text not in self.frames:
            template = self.reading["chat_template"]
            self.frames[text] = build_frame(self.tokenizer, template, text)
        frame = self.frames[text]
        captions = [
            item["text"] if isinstance(item, dict) else str(item) for item in inputs
        ]
        most = min(
            self.reading["max_tokens"],
            self.max_seq_length or self.reading["max_tokens"],
        )
        rows, _ = tokenize(self.tokenizer, [frame] * len(captions), captions, most)
        lengths_B1 = torch.tensor([[len(ids)] for ids in rows])
        longest = int(lengths_B1.max())
        tokenizer: Any = self.tokenizer
        padding = tokenizer.pad_token_id or 0
        ids_BT = torch.tensor(
            [[*ids, *[padding] * (longest - len(ids))] for ids in rows]
        )
        position_T = torch.arange(longest)
        has_token_BT = position_T < lengths_B1
        pooled_BT = has_token_BT & (position_T >= len(frame.head))
        if self.reading["include_bos"] and frame.has_bos:
            pooled_BT[:, 0] = True
        return {
            "input_ids": ids_BT,
            "attention_mask": has_token_BT.long(),
            "position_ids": position_T * has_token_BT,
            "pooled_tokens": pooled_BT.long(),
            "modality": "text",
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """As Transformer's; the attention mask that Pooling gets marks the tokens to pool."""
        read = {
            name: value for name, value in features.items() if name != "pooled_tokens"
        }
        output = super().forward(read, **kwargs)
        return {**output, "attention_mask": features["pooled_tokens"]}

    def get_config_dict(self) -> dict[str, Any]:
        """As Transformer's; weights with a merged adapter are saved with the module."""
        config = super().get_config_dict()
        if not hasattr(self.model, "peft_config"):
            config["llm"] = ""
        return config
