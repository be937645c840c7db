"""What a plan of stage 1 says: the LLM's shape with its adapter, on the meta device, and memory."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from llm2clip_plugin.plan.describe import describe_memory
from llm2clip_plugin.plan.memory import GIB, StepMemory, activation_bytes
from llm2clip_plugin.precision import DTYPES
from llm2clip_plugin.text.adapter import add_lora, autocast_adapter
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings
from llm2clip_plugin.text.llm import (
    CaptionModel,
    keep_layers,
    refuse_length_dependent_rope,
    set_attention,
    set_kernels,
)
from llm2clip_plugin.text.pair_module import PairModule, equal_parts
from llm2clip_plugin.train.config import OptimConfig, TrainConfig
from llm2clip_plugin.train.model import enable_gradient_checkpointing
from llm2clip_plugin.train.optim import chosen_optimizer

# of a text, template and prompt included, in the first table of a plan
ASSUMED_TOKENS = 64
TEXTS = 64  # of the passes that measure activations
# bytes of a value in bitsandbytes' NF4 with double quantization: half a byte, a byte of scale for
# 64 values, 4 bytes of a scale's scale for 256 x 64 (Dettmers et al. 2023, arXiv 2305.14314)
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (256 * 64)


@dataclass(frozen=True, kw_only=True)
class LlmShape:
    """An LLM with its adapter on the meta device, and its size."""

    llm: nn.Module  # only the adapter trains
    kind: str  # transformers' model_type
    blocks: int
    width: int
    parameters: int  # of the LLM, with its embeddings, without its language-model head
    dtype: torch.dtype  # of computation
    frozen_bytes: float
    adapted: tuple[str, ...]  # names of the layers with LoRA


def shape_llm(
    settings: PretrainedConfig,
    config: EncoderConfig,
    lora: LoraSettings,
    precision: str,
    *,
    last_blocks: int = 0,
) -> LlmShape:
    """The LLM up to the pooled layer with its adapter, reduced to its last ``last_blocks`` blocks
    if that is not 0.

    Raises ValueError for a model that isn't a decoder, and for a layer or LoRA target that it
    doesn't have.
    """
    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    set_attention(settings, config.attention)
    # "auto" is bfloat16 on GPUs; precision is the adapter's, and bf16 and fp16 are the LLM's too
    compute = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    dtype = getattr(torch, compute) if precision == "fp32" else DTYPES[precision]
    with torch.device("meta"):
        llm = AutoModel.from_config(
            settings, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        llm = llm if text is settings else llm.language_model
        keep_layers(llm, config.layer)
        set_kernels(llm, config.attention)
        blocks = llm.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        depth = len(blocks)
        if last_blocks:
            del blocks[: max(0, depth - last_blocks)]
        llm.requires_grad_(False)
        parameters = sum(p.numel() for p in llm.parameters())
        linear = sum(
            p.weight.numel() for p in llm.modules() if isinstance(p, nn.Linear)
        )
        quantized = linear if config.load_in_4bit else 0
        wrapped = add_lora(llm, lora, base=config.llm)
    wrapped = wrapped if precision == "fp32" else wrapped.to(dtype)
    adapted: set[str] = set()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            layer = name.partition(".lora_")[0]
            adapted.add(layer.rpartition(".")[2])
    frozen_bytes = (parameters - quantized) * dtype.itemsize + quantized * NF4_BYTES
    return LlmShape(
        llm=wrapped,
        kind=text.model_type,
        blocks=depth,
        width=text.hidden_size,
        parameters=parameters,
        dtype=dtype,
        frozen_bytes=frozen_bytes,
        adapted=tuple(sorted(adapted)),
    )


def describe_llm(
    shape: LlmShape, encoder: EncoderConfig, start_adapters: Sequence[str]
) -> str:
    """The LLM's size, and the adapters that are merged into it."""
    dtype = str(shape.dtype).removeprefix("torch.")
    if encoder.load_in_4bit:
        dtype = f"NF4 and {dtype}"
    starts = "".join(f"; {name} merged" for name in start_adapters)
    return (
        f"LLM: {encoder.llm}, {shape.kind}, {shape.blocks} blocks x {shape.width}, "
        f"{shape.parameters:,} parameters without a head, "
        f"{shape.frozen_bytes / GIB:.2f} GiB in {dtype}{starts}"
    )


def describe_lora(shape: LlmShape, encoder: EncoderConfig, lora: LoraSettings) -> str:
    """The adapter that trains."""
    assumed = " (assumed of --adapter)" if encoder.adapter else ""
    return (
        f"LoRA{assumed}: r {lora.r}, alpha {lora.alpha} on {', '.join(shape.adapted)}"
    )


def describe_llm_memory(
    shape: LlmShape,
    settings: PretrainedConfig,
    encoder: EncoderConfig,
    lora: LoraSettings,
    contrast: ContrastConfig,
    optim: OptimConfig,
    train: TrainConfig,
    *,
    texts: int,
    gpu_gib: float,
) -> list[str]:
    """Tables of memory for pairs of ``texts`` texts: of usual captions, and of the longest that
    are not truncated."""
    # ZeRO-3 can't partition 4-bit weights
    stages = (0, 1, 2) if encoder.load_in_4bit else (0, 1, 2, 3)
    tables: list[str] = []
    for tokens in sorted({min(ASSUMED_TOKENS, encoder.max_tokens), encoder.max_tokens}):
        about = f", for pairs of {texts} texts of {tokens} tokens"
        memory = llm_memory(
            shape,
            settings,
            encoder,
            lora,
            contrast,
            optim,
            train,
            texts=texts,
            tokens=tokens,
        )
        tables.append(
            describe_memory(memory, train, gpu_gib, about=about, stages=stages)
        )
    return tables


def llm_memory(
    shape: LlmShape,
    settings: PretrainedConfig,
    encoder: EncoderConfig,
    lora: LoraSettings,
    contrast: ContrastConfig,
    optim: OptimConfig,
    train: TrainConfig,
    *,
    texts: int,
    tokens: int,
) -> StepMemory:
    """Of pairs of ``texts`` texts, measured on a few blocks of fake tensors: memory grows linearly
    with blocks."""
    bytes_of: dict[int, float] = {}
    for blocks in {min(1, shape.blocks), min(2, shape.blocks)}:
        part = shape_llm(settings, encoder, lora, train.precision, last_blocks=blocks)
        if train.gradient_checkpointing:
            enable_gradient_checkpointing(part.llm)
        bytes_of[blocks] = texts_bytes(part, encoder.pooling, contrast, tokens)
    few = min(bytes_of)
    more = max(bytes_of)
    slope = (bytes_of[more] - bytes_of[few]) / max(1, more - few)
    text_bytes = bytes_of[more] + slope * (shape.blocks - more)
    return StepMemory(
        precision=train.precision,
        trained=sum(p.numel() for p in shape.llm.parameters() if p.requires_grad),
        frozen_bytes=shape.frozen_bytes,
        parameters=shape.parameters,
        pair_bytes=texts * text_bytes / TEXTS,
        width=shape.width,
        state_bytes=chosen_optimizer(optim).state_bytes,
    )


def texts_bytes(
    shape: LlmShape, pooling: str, contrast: ContrastConfig, tokens: int
) -> float:
    """Activations of TEXTS texts of ``tokens`` tokens, in the step's groups."""
    model = CaptionModel(shape.llm, pooling)
    model.autocast = autocast_adapter(shape.llm, shape.dtype)
    module = PairModule(model, contrast).train()

    def make_inputs() -> list[Tensor]:
        inputs: list[Tensor] = []
        for part in equal_parts(range(TEXTS), contrast.length_groups):
            ids = torch.zeros(len(part), tokens, dtype=torch.int64)
            # ids, attention mask, positions, pooling mask
            inputs += [ids, ids, ids, ids.bool()]
        return inputs

    def forward(*inputs: Tensor) -> Tensor:
        return module(*inputs)[0].sum()

    return activation_bytes(module, make_inputs, forward)
