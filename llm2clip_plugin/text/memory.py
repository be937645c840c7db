"""What an LLM weighs and what autograd keeps of a text, from its config.json alone: no weights are read.

Counted as train.memory counts a tower: the last one and two blocks run on a few tokens, with the adapter as it will
train, under hooks that see every tensor kept for the backward pass; all of that grows with the tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

from llm2clip_plugin.text.adapter import LoraSettings, add_lora
from llm2clip_plugin.text.model import CaptionModel, is_decoder, keep_layers, refuse_length_dependent_rope
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.tokens import Batch
from llm2clip_plugin.train.memory import DTYPES, Kept, Model, kept_bytes

PROBE_TOKENS = 32  # of a text that is counted with
PROBE_TEXTS = 2  # one of them a token shorter, so that there is padding and a mask, as in training
# see train.memory; an fp32 adapter turns all that a half-precision LLM gives it into fp32, and the gradients too.
# Measured peaks are .90 to 1.01 of the sum (tests/text/test_llm_plan.py, and Gemma 3 270M)
IN_FLIGHT, IN_FLIGHT_MIXED = 0.5, 0.75
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# a value in bitsandbytes' NF4 with double quantisation: half a byte, a byte of scale for 64 values (Dettmers et al.
# 2023, arXiv 2305.14314), 4 bytes of a scale's scale for 256 x 64
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (256 * 64)
_LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {  # LLMs whose config.json the Hub gives to those alone who signed for it
    "meta-llama/Llama-3.2-1B-Instruct": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
    },
}


def llm_config(config: EncoderConfig) -> PretrainedConfig:
    """The LLM's configuration: of its folder, known here, or its config.json from the Hub.

    Raises FileNotFoundError saying what was looked for.
    """
    if not config.llm:
        raise FileNotFoundError("no LLM is named; give --llm PATH_OR_HUB_ID")
    if not Path(config.llm).is_dir() and config.llm in SHAPES:
        return LlamaConfig(**SHAPES[config.llm])
    try:
        return AutoConfig.from_pretrained(config.llm, revision=config.revision or None)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no config.json of LLM {config.llm!r} here or on the Hub: {reason}") from error


@dataclass(frozen=True, kw_only=True)
class LlmShape:
    """An LLM with its adapter on the meta device, and what it weighs."""

    llm: nn.Module  # the adapter alone trains
    kind: str  # as transformers calls it
    blocks: int
    width: int
    parameters: int  # of the LLM, embeddings with it, the head that tells tokens apart not
    dtype: torch.dtype  # that it computes in
    frozen_bytes: float
    adapted: tuple[str, ...]  # names of the layers with LoRA


def shape_llm(
    settings: PretrainedConfig, config: EncoderConfig, lora: LoraSettings, precision: str, *, last_blocks: int = 0
) -> LlmShape:
    """The LLM up to the pooled layer with its adapter, or its last blocks alone without the table of embeddings.

    Raises ValueError for what is no decoder, a layer or LoRA target that it doesn't have.
    """
    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    settings.is_causal = text.is_causal = config.attention == "causal"
    # "auto" is bfloat16 on GPUs; precision is the adapter's, and another than fp32 is the LLM's too
    dtype = COMPUTE.get(config.compute_dtype, torch.bfloat16) if precision == "fp32" else DTYPES[precision]
    with torch.device("meta"):
        llm = AutoModel.from_config(settings, dtype=dtype)
        llm = llm if text is settings else llm.language_model
        if not is_decoder(llm):
            raise ValueError(
                f"{config.llm} is a {type(llm).__name__}; expected a decoder such as Llama, Qwen, Mistral or Gemma"
            )
        keep_layers(llm, config.layer)
        blocks = llm.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        depth = len(blocks)
        if last_blocks:
            del blocks[: max(0, depth - last_blocks)]
            llm.set_input_embeddings(nn.Embedding(1, text.hidden_size, dtype=dtype))
        llm.requires_grad_(False)
        parameters = sum(p.numel() for p in llm.parameters())
        quantised = (
            sum(p.weight.numel() for p in llm.modules() if isinstance(p, nn.Linear)) if config.load_in_4bit else 0
        )
        wrapped = add_lora(llm, lora, base=config.llm)
    wrapped = wrapped if precision == "fp32" else wrapped.to(dtype)
    adapted = {n.partition(".lora_")[0].rpartition(".")[2] for n, p in wrapped.named_parameters() if p.requires_grad}
    return LlmShape(
        llm=wrapped,
        kind=text.model_type,
        blocks=depth,
        width=text.hidden_size,
        parameters=parameters,
        dtype=dtype,
        frozen_bytes=(parameters - quantised) * dtype.itemsize + quantised * NF4_BYTES,
        adapted=tuple(sorted(adapted)),
    )


def kept_by_token(settings: PretrainedConfig, config: EncoderConfig, lora: LoraSettings, precision: str) -> Kept:
    """Bytes kept of a token: those of PROBE_TEXTS texts, shared out among their tokens."""
    one, two = (
        _kept_by(shape_llm(settings, config, lora, precision, last_blocks=count), config.pooling) for count in (1, 2)
    )
    whole = shape_llm(settings, config, lora, precision)
    block = two - one
    state = PROBE_TEXTS * PROBE_TOKENS * whole.width * whole.dtype.itemsize
    # the lowest block keeps less than the others, so little that the final norm and the pooling may not outweigh it
    kept = Kept(block=block, state=state, rest=max(0, one - block), blocks=whole.blocks)
    return kept.times(1 / (PROBE_TEXTS * PROBE_TOKENS))


def _kept_by(shape: LlmShape, pooling: str) -> int:
    """Bytes kept of the texts that are counted with, weights all zero."""
    llm = shape.llm.to_empty(device="cpu").train()
    for tensor in (*llm.parameters(), *llm.buffers()):
        tensor.data.zero_()
    size = (PROBE_TEXTS, PROBE_TOKENS)
    attended = torch.ones(size, dtype=torch.int64)
    attended[-1, -1] = 0
    positions = torch.arange(PROBE_TOKENS).expand(size)
    batch = Batch(torch.zeros(size, dtype=torch.int64), attended, positions, attended.bool())
    model = CaptionModel(llm, pooling).train()
    return kept_bytes(model, lambda: nn.functional.normalize(model(batch), dim=1))


def model_of(shape: LlmShape, pair: Kept, precision: str, *, checkpointing: bool, at_once: float) -> Model:
    """The numbers that a rank's memory follows from; ``pair``: bytes kept of a pair; ``at_once``: see Model."""
    trained = sum(p.numel() for p in shape.llm.parameters() if p.requires_grad)
    return Model(
        precision=precision,
        checkpointing=checkpointing,
        trained=trained,
        frozen=shape.parameters,
        frozen_size=shape.frozen_bytes / shape.parameters,
        kept=pair,
        kept_text=0,
        projection_dim=shape.width,
        pixels=0,
        at_once=at_once,
        in_flight=IN_FLIGHT if shape.dtype == DTYPES[precision] else IN_FLIGHT_MIXED,
    )
