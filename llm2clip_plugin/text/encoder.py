"""CaptionEncoder: captions in, embeddings out; a caption's embedding does not depend on its batch.
And its adapters.

Shape letters: N captions, B captions of a batch, T tokens, W embedding width.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import EncoderCard, TeacherIdentity
from llm2clip_plugin.data.sources import ReadConfig, SourceConfig, open_source
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import canonical_json, files_sha256, sha256_text, sha256_weights
from llm2clip_plugin.pretrained import check_vocabulary, code_of, open_pretrained
from llm2clip_plugin.quiet import quiet_peft
from llm2clip_plugin.text import llm as llms
from llm2clip_plugin.text.config import (
    ALL_LINEAR,
    IDENTITY_SETTINGS,
    EncoderConfig,
    LoraSettings,
    effective,
)
from llm2clip_plugin.text.frames import Frame, build_frame, tokenize
from llm2clip_plugin.text.identity import config_sha256, tokenizer_sha256
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.train.model import compile_blocks
from llm2clip_plugin.vision.directory import fetch_directory, read_json

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

    def __init__(self, config: EncoderConfig, device: torch.device | str | None) -> None:
        self.device = choose_device(str(device or ""))
        if config.compute_dtype == "auto":
            self.dtype = llms.fastest_dtype(self.device)
        else:
            self.dtype = getattr(torch, config.compute_dtype)

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
        distinct = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        embeddings_UW = torch.empty(len(distinct), self.width)
        budget = tokens_per_batch or (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS)
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
        index_N = torch.tensor([distinct[caption] for caption in captions], dtype=torch.int64)
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
            raise ContractError(
                f"{config.adapter} was trained on {card.base} "
                f"with weights {card.base_sha256[:12]}..., "
                f"but {config.llm} has {self._weights_sha256[:12]}...; "
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
        trusts = self.trust_remote_code
        with errors_about(f"the tokenizer in {self.folder}", fix="copy the LLM again"):
            return open_pretrained(AutoTokenizer, self.folder, trust_remote_code=trusts)

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
        if not trainable and self.dtype == torch.float32 and not self.config.load_in_4bit:
            return merge(wrapped)
        for name, parameter in wrapped.named_parameters():
            # otherwise activations would be converted at every layer
            if ".lora_" in name and not trainable:
                parameter.data = parameter.data.to(self.dtype)
        return wrapped

    def collate(self, rows: Sequence[Sequence[int]], frames: Sequence[Frame]) -> llms.TokenBatch:
        """Rows of token ids, each with its frame, as one (B, T) batch on the encoder's device,
        padded on the right.

        The tokens of the frame's head are not pooled, except BOS with ``include_bos``.
        """
        # padding is masked
        longest = max(map(self.padded_length, rows))
        pad = self.tokenizer.pad_token_id or 0
        # of all rows at once: a GPU waits meanwhile, and row by row takes ten times as long
        input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in rows])
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
            config_sha256=self._config_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
        )

    def tokenize(self, captions: Sequence[str], *, query: bool = False) -> list[list[int]]:
        frames = [self.query_frame if query else self.frame] * len(captions)
        rows, truncated = tokenize(self.tokenizer, frames, captions, self.config.max_tokens)
        self.count_truncated += truncated
        return rows

    # not inference_mode: under ZeRO-3 it would spoil the parameters that a forward pass gathers
    @torch.no_grad()
    def embed_tokens(self, rows: Sequence[Sequence[int]], *, query: bool = False) -> Tensor:
        frames = [self.query_frame if query else self.frame] * len(rows)
        embeddings_BW = self.model(self.collate(rows, frames)).cpu()
        return embeddings_BW if self.post is None else self.post(embeddings_BW)


def absolute(name: str) -> str:
    """A local folder as an absolute path; a Hub id as it is."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


# Centering and removed components of embeddings after pooling, fitted on captions and saved as a
# file.

POST_FILE = "llm2clip_post.safetensors"


@dataclass(frozen=True)
class Post:
    """embedding -> embedding - mean, without its part along the removed directions."""

    mean: Tensor  # (W,)
    removed: Tensor | None = None  # (W, K), orthonormal columns

    def __call__(self, embeddings_NW: Tensor) -> Tensor:
        """(N, W) float32 -> (N, W)."""
        centered_NW = embeddings_NW - self.mean
        if self.removed is None:
            return centered_NW
        return centered_NW - centered_NW @ self.removed @ self.removed.T

    def save(self, folder: Path) -> str:
        """Write POST_FILE into ``folder``; returns its hash, which the card records."""
        present = {
            name: tensor.contiguous() for name, tensor in vars(self).items() if tensor is not None
        }
        save_file(present, str(folder / POST_FILE))
        return sha256_weights(folder / POST_FILE)


def open_post(path: Path, width: int, sha256: str = "") -> tuple[Post, str]:
    """A saved file for embeddings ``width`` wide, and its hash.

    Raises FileNotFoundError, or ContractError for another width or another hash than ``sha256``.
    """
    with errors_about(path, fix="write it again"):  # `llm2clip evaluate captions --search` does
        post = Post(**load_file(path))
    if len(post.mean) != width:
        raise ContractError(
            f"{path} is for embeddings of width {len(post.mean)}, but the LLM's have {width}"
        )
    actual = sha256_weights(path)
    if sha256 not in ("", actual):
        raise ContractError(
            f"{path} has SHA-256 {actual}, {EncoderCard.FILE} has {sha256}; copy the folder again"
        )
    return post, actual


def remove_components(embeddings_NW: Tensor, counts: Sequence[int]) -> list[Post]:
    """Centering, then without the ``count`` largest principal components of (N, W), for each of
    ``counts``.

    All-but-the-top (Mu & Viswanath 2018, arXiv 1702.01417). Raises ValueError if there are too few
    captions or directions for a count.
    """
    captions, width = embeddings_NW.shape
    if not 0 <= max(counts) < min(captions, width):
        raise ValueError(
            f"cannot remove {max(counts)} components of {width}, fitted on {captions} captions"
        )
    mean_W = embeddings_NW.double().mean(dim=0)
    # ascending
    _, directions_WW = torch.linalg.eigh(torch.cov((embeddings_NW.double() - mean_W).T))
    removed = [directions_WW[:, width - count :].float() if count else None for count in counts]
    return [Post(mean_W.float(), removed_WK) for removed_WK in removed]


def first_captions(data: str, limit: int, read: ReadConfig | None = None) -> list[str]:
    """The first ``limit`` distinct captions of a data set, of any kind and language."""
    source = open_source(SourceConfig(path=data, **vars(read or ReadConfig())))
    texts: dict[str, None] = {}
    for number in range(len(source)):
        texts |= dict.fromkeys(caption.text for caption in source.captions(number)[1])
        if len(texts) >= limit:
            break
    return list(texts)[:limit]


# PEFT adapters on an LLM: a new LoRA to train, a saved one attached or merged, and the folder that
# holds one.

TOKENIZER_FILES = ("*.model", "*.txt", "*.jinja")
CODE = "*.py"
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of an adapter that change its output; the rest of its configuration is left out of the
# hash.
ADAPTER_SETTINGS = (
    *("r", "lora_alpha", "use_rslora", "use_dora"),
    *("target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"),
)
# Of these only the ones that an adapter sets: adapters without them keep their hash.
RARE_ADAPTER_SETTINGS = (
    *("fan_in_fan_out", "layers_pattern", "exclude_modules", "layer_replication", "lora_bias"),
    *("alora_invocation_tokens", "target_parameters", "trainable_token_indices", "use_qalora"),
)
# An adapter trained on the model with its language head names the blocks one level deeper.
HEAD_PREFIX = re.compile(r"^base_model\.model\.model\.")
BLOCK = re.compile(r"\blayers\.(\d+)\.")


def local_folder(llm: str, revision: str = "", *, also: tuple[str, ...] = ()) -> Path:
    """The folder of an LLM: ``llm`` itself, or its snapshot from the Hub, downloaded unless it is
    cached. ``also``: patterns of files to download besides configurations, weights and tokenizer.
    Raises ValueError for an empty ``llm``, FileNotFoundError if neither a folder nor the Hub has
    it."""
    if not llm:
        raise ValueError("no LLM given; set --llm PATH_OR_HUB_ID")
    folder = fetch_directory(llm, revision=revision or None, also=(*TOKENIZER_FILES, *also))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{llm} has no config.json; expected a Hugging Face model folder")
    return folder


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a model folder's weights; raises FileNotFoundError if there are none."""
    paths: list[Path] = []
    for pattern in WEIGHT_PATTERNS:
        paths = paths or sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder} has no weights (no {' or '.join(WEIGHT_PATTERNS)})")
    for path in paths:
        if not path.is_file():  # reading a named pipe would wait forever
            raise ContractError(f"{path} is not a regular file; copy the LLM again")
    return files_sha256(paths)


def adapter_sha256(folder: Path) -> str:
    """SHA-256 over a PEFT adapter: tensors and ``ADAPTER_SETTINGS``. FileNotFoundError for a folder
    without one."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a PEFT adapter: {name} is missing; pass its folder or Hub id"
            )
    settings = read_json(folder / ADAPTER_CONFIG)
    relevant = {name: settings.get(name) for name in ADAPTER_SETTINGS}
    relevant |= {name: settings[name] for name in RARE_ADAPTER_SETTINGS if settings.get(name)}
    if isinstance(relevant["target_modules"], list):
        # PEFT writes a set in random order
        relevant["target_modules"] = sorted(map(str, relevant["target_modules"]))
    weights = sha256_weights(folder / ADAPTER_WEIGHTS)
    return sha256_text(canonical_json([weights, relevant]))


def add_lora(llm: nn.Module, settings: LoraSettings, *, base: str) -> nn.Module:
    """The LLM wrapped in a new LoRA adapter, which alone is trainable. Raises ValueError for
    unknown target names."""
    quiet_peft()
    from peft import LoraConfig, PeftModel

    names: set[str] = set()
    for name, module in llm.named_modules():
        if isinstance(module, nn.Linear):
            names.add(name.rpartition(".")[2])
    linear = sorted(names)
    unknown = [name for name in settings.targets if name not in (ALL_LINEAR, *linear)]
    if unknown:
        raise ValueError(
            f"unknown LoRA targets {unknown}; "
            f"linear layers of this LLM: {', '.join(linear)}, all-linear"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=linear if ALL_LINEAR in settings.targets else list(settings.targets),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        bias="none",
        base_model_name_or_path=base,
    )
    return PeftModel(llm, config)  # type: ignore[arg-type]


def save_adapter(
    wrapped: nn.Module,
    trained: dict[str, Tensor],
    card: EncoderCard,
    directory: Path,
    *,
    starts: Sequence[Path] = (),
    replace: bool = False,
) -> None:
    """Write a PEFT adapter's folder and card, atomically; ``trained``: parameters by their names in
    ``wrapped``. ``starts``: adapters that were merged into the LLM; the folder's one adapter adds
    what they and ``trained`` add."""
    config = wrapped.peft_config["default"]  # type: ignore[index]
    named = adapter_state(wrapped, trained)
    if starts:
        config, named = stack([*map(read_lora, starts), (config, named)])
    with atomic_directory(directory, replace=replace) as temporary:
        config.save_pretrained(str(temporary))  # type: ignore[union-attr, operator]
        tensors = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(tensors, str(temporary / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        card.write(temporary / EncoderCard.FILE)


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False):
    """The LLM wrapped in the adapter saved in ``folder`` (a ``PeftModel``). Raises ContractError if
    a tensor is missing, unexpected or of another shape, but for blocks above the pooled layer,
    which the model has dropped."""
    quiet_peft()
    from peft import PeftModel, set_peft_model_state_dict

    config, tensors = read_adapter(folder)
    config.inference_mode = not trainable
    blocks = len(model.get_submodule("layers"))  # type: ignore[arg-type]
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = BLOCK.search(name)
        if match is None or int(match[1]) < blocks:
            saved[name] = tensor
    with errors_about(f"{folder}, which does not fit {model.name_or_path},"):
        wrapped = PeftModel(model, config)
        expected_shapes = named_shapes(adapter_state(wrapped))
        saved_shapes = named_shapes(saved)
        if expected_shapes != saved_shapes:
            missing = sorted(expected_shapes - saved_shapes)
            unexpected = sorted(saved_shapes - expected_shapes)
            raise ValueError(f"expected {missing[:3]}, it has {unexpected[:3]}")
    set_peft_model_state_dict(wrapped, saved)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trainable and ".lora_" in name)
    return wrapped


def named_shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor."""
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def adapter_state(wrapped: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names; ``state``: parameters by their names in ``wrapped``,
    by default its own.

    Without a word PEFT would look for the LLM's config.json, on the Hub too, to see whether its
    vocabulary has grown.
    """
    from peft import get_peft_model_state_dict

    targets = wrapped.peft_config["default"].target_modules or ()  # type: ignore[index]
    adapts_embeddings = any(name in targets for name in ("embed_tokens", "lm_head"))
    saved = get_peft_model_state_dict(
        wrapped, state_dict=state, save_embedding_layers=adapts_embeddings
    )
    return saved  # type: ignore[return-value]


def read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The ``LoraConfig`` and tensors of a saved adapter, named as in an LLM without its language
    head."""
    from peft import LoraConfig

    with errors_about(folder / ADAPTER_CONFIG, fix="copy the adapter again"):
        config = LoraConfig.from_pretrained(str(folder))
    with errors_about(folder / ADAPTER_WEIGHTS, fix="copy the adapter again"):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed[HEAD_PREFIX.sub("base_model.model.", name)] = tensor
    return config, renamed


def read_lora(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """As ``read_adapter``; raises ValueError for an adapter that is more than one rank and scale,
    such as DoRA."""
    config, tensors = read_adapter(folder)
    unsupported = ("use_dora", "rank_pattern", "alpha_pattern")
    special = [name for name in unsupported if getattr(config, name)]
    if special:
        raise ValueError(
            f"start adapter {folder} sets {', '.join(special)}; "
            "merge it into --llm with export-llm first"
        )
    return config, tensors


def merge_adapters(llm: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """The LLM with saved LoRA adapters merged into its weights, in their order."""
    for folder in folders:
        read_lora(folder)
        llm = merge(attach_adapter(llm, folder))
    return llm


def stack(adapters: Sequence[tuple[Any, dict[str, Tensor]]]) -> tuple[Any, dict[str, Tensor]]:
    """One LoRA that adds what all (config, tensors) add together, with the rest of the last one's
    configuration.

    sum_i s_i B_i A_i = [B_1 B_2 ...] [s_1 A_1; s_2 A_2; ...], s_i the scale of adapter i; its own
    scale is 1. A layer that an adapter leaves out has zeros.
    """
    adapter_with: dict[str, dict[str, Tensor]] = {}  # layer -> tensors of an adapter that has it
    for _, tensors in adapters:
        for name in tensors:
            adapter_with[name.rpartition(".lora_")[0]] = tensors
    stacked: dict[str, Tensor] = {}
    for layer, example in adapter_with.items():
        a_name = f"{layer}.lora_A.weight"
        b_name = f"{layer}.lora_B.weight"
        inputs = example[a_name].shape[1]
        outputs = example[b_name].shape[0]
        a_parts: list[Tensor] = []
        b_parts: list[Tensor] = []
        for config, tensors in adapters:
            scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
            if a_name in tensors and b_name in tensors:
                a_parts.append(scale * tensors[a_name].float())
                b_parts.append(tensors[b_name].float())
            else:
                a_parts.append(torch.zeros(config.r, inputs))
                b_parts.append(torch.zeros(outputs, config.r))
        stacked[a_name] = torch.cat(a_parts, dim=0)
        stacked[b_name] = torch.cat(b_parts, dim=1)
    rank = sum(config.r for config, _ in adapters)
    targets = sorted({layer.rpartition(".")[2] for layer in adapter_with})
    last, _ = adapters[-1]
    config = dataclasses.replace(
        last, r=rank, lora_alpha=rank, use_rslora=False, target_modules=targets
    )
    return config, stacked


def autocast_adapter(wrapped: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """Have an fp32 adapter on an LLM in half precision computed in the LLM's ``dtype``: PEFT would
    convert every layer's input to fp32 and keep it. Returns the dtype for
    ``CaptionModel.autocast``; None where products stay as they are: all of one dtype, or DoRA,
    whose norms of weights need fp32."""
    has_fp32_adapter = False
    has_dora = False
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name and parameter.dtype == torch.float32:
            has_fp32_adapter = True
        if "lora_magnitude_vector" in name:
            has_dora = True
    if dtype == torch.float32 or not has_fp32_adapter or has_dora:
        return None
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return dtype


def merge(wrapped) -> PreTrainedModel:
    """The LLM with the adapter merged into its weights."""
    with torch.no_grad():
        return wrapped.merge_and_unload()
