"""CaptionEncoder: captions in, embeddings out; a caption's embedding does not depend on its batch.

Shape letters: N captions, B captions of a batch, T tokens, W embedding width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import ReadConfig, SourceConfig, open_source
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import files_sha256, sha256_text
from llm2clip_plugin.precision import fastest_dtype, warn_if_slow
from llm2clip_plugin.pretrained import check_vocabulary, code_of, open_pretrained
from llm2clip_plugin.text import llm as llms
from llm2clip_plugin.text.adapter import adapter_sha256, attach_adapter, merge
from llm2clip_plugin.text.config import (
    IDENTITY_SETTINGS,
    EncoderConfig,
    effective,
)
from llm2clip_plugin.text.frames import Frame, build_frame, tokenize
from llm2clip_plugin.text.identity import config_sha256, tokenizer_sha256
from llm2clip_plugin.text.post import POST_FILE, Post, open_post
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.train.model import compile_blocks
from llm2clip_plugin.vision.directory import (
    fetch_directory,
    refuse_shards_without_index,
)

# tokens of a batch, padding included; a CPU gains nothing from more, and padding grows with it
CPU_TOKENS = 512
GPU_TOKENS = 65536


class TextEncoder(ABC):
    """A frozen model that embeds captions: an LLM (CaptionEncoder), or a CLIP's text tower
    (ClipTextEncoder)."""

    config: EncoderConfig  # the effective settings
    width: int  # W
    count_truncated: int = 0  # captions truncated to ``max_tokens`` so far
    model: Any
    is_compiled = False

    def __init__(
        self, config: EncoderConfig, device: torch.device | str | None
    ) -> None:
        self.device = choose_device(str(device or ""))
        if config.compute_dtype == "auto":
            self.dtype = fastest_dtype(self.device)
        else:
            self.dtype = getattr(torch, config.compute_dtype)
            warn_if_slow(self.dtype, self.device, "--compute-dtype", "the LLM")

    @abstractmethod
    def identity(self) -> TeacherIdentity:
        """Everything that determines an embedding; caches and towers record it."""

    @abstractmethod
    def tokenize(
        self, captions: Sequence[str], *, query: bool = False
    ) -> list[list[int]]:
        """Token ids of each caption, with what surrounds it, truncated to ``max_tokens``."""

    @abstractmethod
    def embed_tokens(
        self, rows: Sequence[Sequence[int]], *, query: bool = False
    ) -> Tensor:
        """(B, W) float32 on the CPU: embeddings of rows of token ids, as one batch."""

    def compile(self) -> None:
        """``torch.compile`` the model's blocks, for batches of any size; ValueError if it has none
        of transformers'."""
        # not in LLaVA's transformers
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [
            module
            for module in self.model.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]
        if not blocks:
            raise ValueError(
                f"{self.config.llm} has no blocks of transformers' to compile; omit --torch-compile"
            )
        compile_blocks(blocks, dynamic=True)
        self.is_compiled = True

    def padded_length(self, ids: Sequence[int]) -> int:
        """Tokens that a row takes at least. Compiled, a multiple of 8, the last one padding:
        without any, transformers leaves the attention mask out, which would be another graph."""
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

        tokens_per_batch: padding included; 0 for the device's default. query: the query prompt for
        the prompt. tokens: ``tokenize``'s of every caption, if they are there already. on_batch:
        called after each batch with the captions done so far and in all, equal ones counted once.
        Equal captions are embedded once. Raises ValueError for a blank caption.
        """
        distinct = {
            caption: index for index, caption in enumerate(dict.fromkeys(captions))
        }
        embeddings_UW = torch.empty(len(distinct), self.width)
        budget = tokens_per_batch or (
            CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        )
        rows: Sequence[Sequence[int]]
        if tokens is None:
            rows = self.tokenize(list(distinct), query=query)
        else:
            rows = [tokens[text] for text in distinct]
        lengths = [self.padded_length(ids) for ids in rows]
        done = 0
        for indices in llms.length_batches(lengths, budget):
            batch = [rows[index] for index in indices]
            embeddings_UW[indices] = self.embed_tokens(batch, query=query)
            done += len(indices)
            if on_batch is not None:
                on_batch(done, len(distinct))
        index_N = torch.tensor(
            [distinct[caption] for caption in captions], dtype=torch.int64
        )
        return embeddings_UW[index_N]


class CaptionEncoder(TextEncoder):
    """A frozen decoder LLM that embeds captions.

    ``config`` has the card's settings and a literal chat template. An embedding differs from that
    of the caption alone by at most 1e-5 of its norm in float32, 2e-2 in bfloat16. Raises
    ContractError if the adapter was trained on another LLM, or a setting contradicts the card.
    """

    def __init__(
        self,
        config: EncoderConfig,
        device: torch.device | str | None = None,
        *,
        trainable_adapter: bool = False,
    ) -> None:
        super().__init__(config, device)
        code = (CODE,) if config.trust_remote_code else ()
        self.folder = local_folder(config.llm, config.revision, also=code)
        adapter = fetch_directory(config.adapter) if config.adapter else None
        self._adapter_sha256 = adapter_sha256(adapter) if adapter else ""
        config, card = effective(config, self.folder, adapter)
        self._weights_sha256 = weights_sha256(self.folder)
        if card is not None and card.base_sha256 not in ("", self._weights_sha256):
            expected = f"{card.base} with weights {card.base_sha256[:12]}..."
            actual = f"{config.llm} has {self._weights_sha256[:12]}..."
            raise ContractError(
                f"{config.adapter} was trained on {expected}, but {actual}; "
                "pass the LLM that it was trained on"
            )
        self.trust_remote_code = config.trust_remote_code
        # before the tokenizer: of code that is not run, there is one line
        settings = llms.read_config(self.folder, config).get_text_config()
        self.tokenizer = self.open_tokenizer()
        self._config_sha256 = self._hash_config(settings, config)
        self._tokenizer_sha256 = tokenizer_sha256(self.tokenizer)
        template = llms.literal_template(self.tokenizer, config.chat_template)
        self.config = dataclasses.replace(config, chat_template=template)
        self.frame = build_frame(self.tokenizer, template, config.prompt)
        self.query_frame = build_frame(self.tokenizer, template, config.query_prompt)
        framing = {*self.frame.head, *self.frame.tail}
        framing |= {*self.query_frame.head, *self.query_frame.tail}
        check_vocabulary(self.tokenizer, settings.vocab_size, self.folder, framing)
        llm = llms.load_backbone(self.folder, config, self.dtype, self.device)
        llm.requires_grad_(False)
        self.width: int = llm.config.get_text_config().hidden_size
        wrapped = self._with_adapter(llm, adapter, trainable_adapter)
        self.post: Post | None = None
        self._post_sha256 = ""
        expected = "" if card is None else card.post_sha256
        if expected or config.post_file:
            path = Path(config.post_file or (adapter or self.folder) / POST_FILE)
            self.post, self._post_sha256 = open_post(path, self.width, expected)
        self.model = llms.CaptionModel(wrapped, config.pooling).eval()

    def open_tokenizer(self) -> Any:
        """The tokenizer in the LLM's folder."""
        return open_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def _hash_config(self, settings: PretrainedConfig, config: EncoderConfig) -> str:
        """Hash of the settings in config.json that decide an embedding, and of the folder's code if
        it is run."""
        has_code = config.trust_remote_code and bool(code_of(self.folder))
        return config_sha256(settings, self.folder if has_code else None)

    def _with_adapter(
        self, llm: PreTrainedModel, adapter: Path | None, trainable: bool
    ) -> torch.nn.Module:
        """The LLM with its adapter: merged in float32, if frozen.

        In half precision it stays separate: a small change added to a bfloat16 weight may round to
        nothing.
        """
        if adapter is None:
            return llm
        wrapped = attach_adapter(llm, adapter, trainable=trainable)
        is_exact = self.dtype == torch.float32 and not self.config.load_in_4bit
        if is_exact and not trainable:
            return merge(wrapped)
        for name, parameter in wrapped.named_parameters():
            # otherwise activations would be converted at every layer
            if ".lora_" in name and not trainable:
                parameter.data = parameter.data.to(self.dtype)
        return wrapped

    def collate(
        self, rows: Sequence[Sequence[int]], frames: Sequence[Frame]
    ) -> llms.TokenBatch:
        """Rows of token ids, each with its frame, as one (B, T) batch on the encoder's device,
        padded on the right.

        The tokens of the frame's head are not pooled, except BOS with ``include_bos``.
        """
        # padding is masked
        longest = max(map(self.padded_length, rows))
        pad = self.tokenizer.pad_token_id or 0
        padded: list[list[int]] = []
        for ids in rows:
            padded.append([*ids, *[pad] * (longest - len(ids))])
        # of all rows at once: a GPU waits meanwhile, and row by row takes ten times as long
        input_ids = torch.tensor(padded)
        start_B1 = torch.tensor([[len(frame.head)] for frame in frames])
        stop_B1 = torch.tensor([[len(ids)] for ids in rows])
        position_T = torch.arange(longest)
        has_token = position_T < stop_B1
        pool_mask = has_token & (position_T >= start_B1)
        if self.config.include_bos:
            pool_mask[:, 0] |= torch.tensor([frame.has_bos for frame in frames])
        return llms.TokenBatch(
            input_ids=input_ids.to(self.device),
            attention_mask=has_token.long().to(self.device),
            position_ids=(position_T * has_token).to(self.device),
            pool_mask=pool_mask.to(self.device),
        )

    def identity(self) -> TeacherIdentity:
        # token ids, so that a re-saved tokenizer keeps its identity
        probe = ",".join(map(str, self.tokenizer(llms.PROBE_TEXT)["input_ids"]))
        settings = {name: vars(self.config)[name] for name in IDENTITY_SETTINGS}
        return TeacherIdentity(
            llm=absolute(self.config.llm),
            revision=self.config.revision,
            weights_sha256=self._weights_sha256,
            adapter_sha256=self._adapter_sha256,
            **settings,
            width=self.width,
            tokenizer=sha256_text(probe)[:16],
            quantization="nf4" if self.config.load_in_4bit else "",
            post=self._post_sha256,
            adapter=absolute(self.config.adapter),
            post_file=absolute(self.config.post_file),
            config_sha256=self._config_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
        )

    def tokenize(
        self, captions: Sequence[str], *, query: bool = False
    ) -> list[list[int]]:
        frames = [self.query_frame if query else self.frame] * len(captions)
        rows, truncated = tokenize(
            self.tokenizer, frames, captions, self.config.max_tokens
        )
        self.count_truncated += truncated
        return rows

    # not inference_mode: under ZeRO-3 it would spoil the parameters that a forward pass gathers
    @torch.no_grad()
    def embed_tokens(
        self, rows: Sequence[Sequence[int]], *, query: bool = False
    ) -> Tensor:
        frames = [self.query_frame if query else self.frame] * len(rows)
        embeddings_BW = self.model(self.collate(rows, frames)).cpu()
        return embeddings_BW if self.post is None else self.post(embeddings_BW)


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in an LLM's folder. Raises ContractError if there is none."""
    with errors_about(f"the tokenizer in {folder}", fix="copy the LLM again"):
        return open_pretrained(
            AutoTokenizer, folder, trust_remote_code=trust_remote_code
        )


def absolute(name: str) -> str:
    """A local folder or file as an absolute path; a Hub id as it is."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def first_captions(
    data: str,
    limit: int,
    read: ReadConfig | None = None,
    broken: list[BrokenSample] | None = None,
) -> list[str]:
    """The first ``limit`` distinct captions of a data set, of any kind and language. Samples that
    can't be read are left out, and added to ``broken``."""
    source = open_source(SourceConfig(path=data, **vars(read or ReadConfig())))
    texts: dict[str, None] = {}
    for number in range(len(source)):
        try:
            sample = source[number]
        except BrokenSample as error:
            if broken is not None:
                broken.append(error)
            continue
        texts |= dict.fromkeys(caption.text for caption in sample.captions)
        if len(texts) >= limit:
            break
    return list(texts)[:limit]


# PEFT adapters on an LLM: a new LoRA to train, a saved one attached or merged, and the folder that
# holds one.

TOKENIZER_FILES = ("*.model", "*.txt", "*.jinja")
CODE = "*.py"
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


def local_folder(llm: str, revision: str = "", *, also: tuple[str, ...] = ()) -> Path:
    """The folder of an LLM: ``llm`` itself, or its snapshot from the Hub, downloaded unless it is
    cached. ``also``: patterns of files to download besides configurations, weights and tokenizer.
    Raises ValueError for an empty ``llm``, FileNotFoundError if neither a folder nor the Hub has
    it."""
    if not llm:
        raise ValueError("no LLM given; set --llm PATH_OR_HUB_ID")
    folder = fetch_directory(
        llm, revision=revision or None, also=(*TOKENIZER_FILES, *also)
    )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{llm} has no config.json; expected a Hugging Face model folder"
        )
    return folder


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's weights; raises as ``weight_paths``."""
    return files_sha256(weight_paths(folder))


def weight_paths(folder: Path) -> list[Path]:
    """The files of an LLM's weights. Raises FileNotFoundError if there are none, ContractError for
    shards without an index, or what is no file."""
    refuse_shards_without_index(folder)
    paths: list[Path] = []
    for pattern in WEIGHT_PATTERNS:
        paths = paths or sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no weights (no {' or '.join(WEIGHT_PATTERNS)})"
        )
    for path in paths:
        if not path.is_file():  # reading a named pipe would wait forever
            raise ContractError(f"{path} is not a regular file; copy the LLM again")
    return paths
