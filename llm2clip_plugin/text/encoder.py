"""CaptionEncoder: captions in, embeddings out; a caption's embedding does not depend on its batch. And its export.

Shape letters: N captions, B captions of a batch, T tokens, W embedding width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from llm2clip_plugin.contracts import EncoderCard, TeacherIdentity, atomic_directory, sha256_text, sha256_weights
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.files import ContractError, errors_about
from llm2clip_plugin.text import adapter as adapters
from llm2clip_plugin.text import llm as llms
from llm2clip_plugin.text.config import (
    CARD_SETTINGS,
    EXPORT_LLM,
    IDENTITY_SETTINGS,
    EncoderConfig,
    ExportConfig,
    effective,
)
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.train.model import compile_blocks
from llm2clip_plugin.vision.directory import fetch_directory

# tokens of a batch, padding included; a CPU gains nothing from more, and padding grows with it
CPU_TOKENS = 512
GPU_TOKENS = 65536


class TextEncoder(ABC):
    """A frozen model that embeds captions: an LLM (CaptionEncoder), or a CLIP's text tower (ClipTextEncoder)."""

    config: EncoderConfig  # the effective settings
    width: int  # W
    count_truncated: int = 0  # captions truncated to ``max_tokens`` so far
    model: Any
    is_compiled = False

    def __init__(self, config: EncoderConfig, device: torch.device | str | None) -> None:
        self.device = choose_device(str(device or ""))
        auto = config.compute_dtype == "auto"
        self.dtype = llms.fastest_dtype(self.device) if auto else getattr(torch, config.compute_dtype)

    @abstractmethod
    def identity(self) -> TeacherIdentity:
        """Everything that determines an embedding; caches and towers record it."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str], *, query: bool = False) -> list[list[int]]:
        """Token ids of each caption, with what surrounds it, truncated to ``max_tokens``."""

    @abstractmethod
    def embed_tokens(self, rows: Sequence[Sequence[int]], *, query: bool = False) -> Tensor:
        """(B, W) float32 on the CPU: embeddings of rows of token ids, as one batch."""

    def compile(self) -> None:
        """``torch.compile`` the model's blocks, for batches of any size; ValueError if it has none of transformers'."""
        from transformers.modeling_layers import GradientCheckpointingLayer  # not in LLaVA's transformers

        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise ValueError(f"{self.config.llm} has no blocks of transformers' to compile; omit --torch-compile")
        compile_blocks(blocks, dynamic=True)
        self.is_compiled = True

    def padded_length(self, ids: Sequence[int]) -> int:
        """Tokens that a row takes at least. Compiled, a multiple of 8, the last one padding: without any, transformers
        leaves the attention mask out, which would be another graph."""
        return (len(ids) // 8 + 1) * 8 if self.is_compiled else len(ids)

    def encode(
        self,
        captions: Sequence[str],
        *,
        tokens_per_batch: int = 0,
        query: bool = False,
        tokens: Mapping[str, Sequence[int]] | None = None,
        on_batch: Callable[[int, int], object] | None = None,
    ) -> Tensor:
        """(N, W) float32 on the CPU: the embeddings of ``captions``, in their order.

        tokens_per_batch: padding included; 0 for the device's default. query: the query prompt for the prompt.
        tokens: ``tokenize``'s of every caption, if they are there already.
        on_batch: called after each batch with the captions done so far and in all, equal ones counted once.
        Equal captions are embedded once. Raises ValueError for a blank caption.
        """
        distinct = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        embeddings_UW = torch.empty(len(distinct), self.width)
        budget = tokens_per_batch or (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS)
        rows = self.tokenize(list(distinct), query=query) if tokens is None else [tokens[text] for text in distinct]
        done = 0
        for indices in llms.length_batches([self.padded_length(ids) for ids in rows], budget):
            embeddings_UW[indices] = self.embed_tokens([rows[index] for index in indices], query=query)
            done += len(indices)
            if on_batch is not None:
                on_batch(done, len(distinct))
        return embeddings_UW[torch.tensor([distinct[caption] for caption in captions], dtype=torch.int64)]


class CaptionEncoder(TextEncoder):
    """A frozen decoder LLM that embeds captions.

    ``config`` has the card's settings and a literal chat template. An embedding differs from that of the caption alone
    by at most 1e-5 of its norm in float32, 2e-2 in bfloat16.
    Raises ContractError if the adapter was trained on another LLM, or a setting contradicts the card.
    """

    def __init__(
        self, config: EncoderConfig, device: torch.device | str | None = None, *, trainable_adapter: bool = False
    ) -> None:
        super().__init__(config, device)
        self.folder = adapters.local_folder(config.llm, config.revision)
        adapter = fetch_directory(config.adapter) if config.adapter else None
        self._adapter_sha256 = adapters.adapter_sha256(adapter) if adapter else ""
        config, card = effective(config, self.folder, adapter)
        self._weights_sha256 = adapters.weights_sha256(self.folder)
        if card is not None and card.base_sha256 not in ("", self._weights_sha256):
            raise ContractError(
                f"{config.adapter} was trained on {card.base} with weights {card.base_sha256[:12]}..., but "
                f"{config.llm} has {self._weights_sha256[:12]}...; pass the LLM that it was trained on"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        template = llms.literal_template(self.tokenizer, config.chat_template)
        self.config = dataclasses.replace(config, chat_template=template)
        self.frame = llms.build_frame(self.tokenizer, template, config.prompt)
        self.query_frame = llms.build_frame(self.tokenizer, template, config.query_prompt)
        llm = llms.load_backbone(self.folder, config, self.dtype, self.device)
        llm.requires_grad_(False)
        self.width: int = llm.config.get_text_config().hidden_size
        wrapped = self._with_adapter(llm, adapter, trainable_adapter)
        self.post: Post | None = None
        self._post_sha256, own = "", "" if card is None else card.post_sha256
        if own or config.post_file:
            path = Path(config.post_file or (adapter or self.folder) / POST_FILE)
            self.post, self._post_sha256 = open_post(path, self.width, own)
        self.model = llms.CaptionModel(wrapped, config.pooling).eval()

    def _with_adapter(self, llm: PreTrainedModel, adapter: Path | None, trainable: bool) -> torch.nn.Module:
        """The LLM with its adapter: merged in float32, if frozen.

        In half precision it stays separate: a small change added to a bfloat16 weight may round to nothing.
        """
        if adapter is None:
            return llm
        wrapped = adapters.attach_adapter(llm, adapter, trainable=trainable)
        if not trainable and self.dtype == torch.float32 and not self.config.load_in_4bit:
            return adapters.merge(wrapped)
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name and not trainable:  # otherwise activations would be converted at every layer
                parameter.data = parameter.data.to(self.dtype)
        return wrapped

    def collate(self, rows: Sequence[Sequence[int]], frames: Sequence[llms.Frame]) -> llms.TokenBatch:
        """Rows of token ids, each with its frame, as one (B, T) batch on the encoder's device, padded on the right.

        The tokens of the frame's head are not pooled, except BOS with ``include_bos``.
        """
        longest, pad = max(map(self.padded_length, rows)), self.tokenizer.pad_token_id or 0  # padding is masked
        # of all rows at once: a GPU waits meanwhile, and row by row takes ten times as long
        input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in rows])
        start_B1, stop_B1 = (torch.tensor([[len(x)] for x in some]) for some in ([f.head for f in frames], rows))
        place_T = torch.arange(longest)
        has_token = place_T < stop_B1
        pool_mask = has_token & (place_T >= start_B1)
        if self.config.include_bos:
            pool_mask[:, 0] |= torch.tensor([frame.has_bos for frame in frames])
        tensors = input_ids, has_token.long(), place_T * has_token, pool_mask
        return llms.TokenBatch(*(tensor.to(self.device) for tensor in tensors))

    def identity(self) -> TeacherIdentity:
        # token ids, so that a re-saved tokenizer keeps its identity
        probe = ",".join(map(str, self.tokenizer(llms.PROBE_TEXT)["input_ids"]))
        return TeacherIdentity(
            llm=absolute(self.config.llm),
            revision=self.config.revision,
            weights_sha256=self._weights_sha256,
            adapter_sha256=self._adapter_sha256,
            **{name: vars(self.config)[name] for name in IDENTITY_SETTINGS},
            width=self.width,
            tokenizer=sha256_text(probe)[:16],
            quantization="nf4" if self.config.load_in_4bit else "",
            post=self._post_sha256,
            adapter=absolute(self.config.adapter),
        )

    def tokenize(self, captions: Sequence[str], *, query: bool = False) -> list[list[int]]:
        frames = [self.query_frame if query else self.frame] * len(captions)
        rows, truncated = llms.tokenize(self.tokenizer, frames, captions, self.config.max_tokens)
        self.count_truncated += truncated
        return rows

    @torch.no_grad()  # not inference_mode: under ZeRO-3 it would spoil the parameters that a forward pass gathers
    def embed_tokens(self, rows: Sequence[Sequence[int]], *, query: bool = False) -> Tensor:
        frames = [self.query_frame if query else self.frame] * len(rows)
        embeddings_BW = self.model(self.collate(rows, frames)).cpu()
        return embeddings_BW if self.post is None else self.post(embeddings_BW)


def absolute(name: str) -> str:
    """A local folder as an absolute path; a Hub id as it is."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


# Centering and removed components of embeddings after pooling, fitted on captions and saved as a file.

POST_FILE = "llm2clip_post.safetensors"


@dataclass(frozen=True)
class Post:
    """embedding -> embedding - mean, without its part along the removed directions."""

    mean: Tensor  # (W,)
    removed: Tensor | None = None  # (W, K), orthonormal columns

    def __call__(self, embeddings_NW: Tensor) -> Tensor:
        """(N, W) float32 -> (N, W)."""
        centered_NW = embeddings_NW - self.mean
        return centered_NW if self.removed is None else centered_NW - centered_NW @ self.removed @ self.removed.T

    def save(self, folder: Path) -> str:
        """Write POST_FILE into ``folder``; returns its hash, which the card records."""
        present = {name: tensor.contiguous() for name, tensor in vars(self).items() if tensor is not None}
        save_file(present, str(folder / POST_FILE))
        return sha256_weights(folder / POST_FILE)


def open_post(path: Path, width: int, sha256: str = "") -> tuple[Post, str]:
    """A saved file for embeddings ``width`` wide, and its hash.

    Raises FileNotFoundError, or ContractError for another width or another hash than ``sha256``.
    """
    with errors_about(path, fix="write it again"):  # `llm2clip evaluate captions --search` does
        post = Post(**load_file(path))
    if len(post.mean) != width:
        raise ContractError(f"{path} is for embeddings of width {len(post.mean)}, but the LLM's have {width}")
    actual = sha256_weights(path)
    if sha256 not in ("", actual):
        raise ContractError(f"{path} has SHA-256 {actual}, {EncoderCard.FILE} has {sha256}; copy the folder again")
    return post, actual


def remove_components(embeddings_NW: Tensor, counts: Sequence[int]) -> list[Post]:
    """Centering, then without the ``count`` largest principal components of (N, W), for each of ``counts``.

    All-but-the-top (Mu & Viswanath 2018, arXiv 1702.01417). Raises ValueError if there are too few captions or
    directions for a count.
    """
    captions, width = embeddings_NW.shape
    if not 0 <= max(counts) < min(captions, width):
        raise ValueError(f"cannot remove {max(counts)} components of {width}, fitted on {captions} captions")
    mean_W = embeddings_NW.double().mean(dim=0)
    _, directions_WW = torch.linalg.eigh(torch.cov((embeddings_NW.double() - mean_W).T))  # ascending
    removed = [directions_WW[:, width - count :].float() if count else None for count in counts]
    return [Post(mean_W.float(), removed_WK) for removed_WK in removed]


def first_captions(data: str, limit: int) -> list[str]:
    """The first ``limit`` distinct captions of a data set, of any kind and language."""
    source, texts = open_source(SourceConfig(path=data)), dict[str, None]()
    for number in range(len(source)):
        texts |= dict.fromkeys(caption.text for caption in source.captions(number)[1])
        if len(texts) >= limit:
            break
    return list(texts)[:limit]


# ``llm2clip export-llm``: a fine-tuned LLM as a folder of its own.

SAMPLE_CAPTIONS = ["a red bicycle leans against a wall", "two dogs", "猫が眠っている"]  # compared before and after
TOLERANCE = 1e-4  # of an embedding's norm: the same float32 weights, summed in another order once


def main(argv: list[str]) -> int:
    print(f"wrote {export_llm(EXPORT_LLM.parse(argv))}; verified by reloading")
    return 0


def export_llm(config: ExportConfig) -> Path:
    """Write merged weights, tokenizer and card, reload and compare embeddings before the folder is moved to its place.

    Raises ValueError for 4-bit weights, ContractError if the reloaded embeddings differ.
    """
    if config.encoder.load_in_4bit:
        raise ValueError("an adapter cannot be merged into 4-bit weights; omit --load-in-4bit")
    encoder = CaptionEncoder(dataclasses.replace(config.encoder, compute_dtype="float32"), "cpu")
    with atomic_directory(config.output, replace=config.overwrite) as temporary:
        write_merged(encoder, temporary)
        reloaded = CaptionEncoder(EncoderConfig(llm=str(temporary), compute_dtype="float32"), "cpu")
        before_NW, after_NW = (each.encode(SAMPLE_CAPTIONS) for each in (encoder, reloaded))
        worst = float(((before_NW - after_NW).norm(dim=1) / before_NW.norm(dim=1)).max())
        if not worst < TOLERANCE:
            raise ContractError(f"{config.output}: reloaded embeddings differ by {worst:.2g} of their norm")
    return Path(config.output)


def write_merged(encoder: CaptionEncoder, folder: Path) -> None:
    """Write merged weights of all blocks, those above the pooled layer included, with tokenizer and card."""
    config = encoder.config
    model = llms.load_backbone(encoder.folder, dataclasses.replace(config, layer=-1), torch.float32, encoder.device)
    if config.adapter:  # it may cover only the blocks up to the pooled layer
        blocks, norm, depth = model.get_submodule("layers"), model.get_submodule("norm"), model.config.num_hidden_layers
        llms.keep_layers(model, config.layer)
        model = adapters.merge(adapters.attach_adapter(model, fetch_directory(config.adapter)))
        lower = list(model.get_submodule("layers"))  # type: ignore[call-overload]
        model.set_submodule("layers", torch.nn.ModuleList([*lower, *list(blocks)[len(lower) :]]))  # type: ignore[call-overload]
        model.set_submodule("norm", norm)
        model.config.num_hidden_layers = depth
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder.folder).save_pretrained(folder)
    EncoderCard(
        base=config.llm,
        base_sha256="",  # the folder itself holds the weights
        **{name: vars(config)[name] for name in CARD_SETTINGS},
        post_sha256=encoder.post.save(folder) if encoder.post is not None else "",
        training={"adapter_sha256": encoder.identity().adapter_sha256},
    ).write(folder / EncoderCard.FILE)
