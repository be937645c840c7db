"""An LLM's shape with its adapter, from its config.json alone: no weights are read."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

from llm2clip_plugin.outside.timeouts import check_hub_answers
from llm2clip_plugin.text.adapter import LoraSettings, add_lora
from llm2clip_plugin.text.attention import set_attention, set_kernels
from llm2clip_plugin.text.model import is_decoder, keep_layers, refuse_length_dependent_rope
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.memory import DTYPES

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# bytes of a value in bitsandbytes' NF4 with double quantization: half a byte, a byte of scale for 64 values, 4 bytes of
# a scale's scale for 256 x 64 (Dettmers et al. 2023, arXiv 2305.14314)
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (256 * 64)
_LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {  # gated on the Hub: their config.json needs a login
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
    """The LLM's configuration: from its folder, from SHAPES, or its config.json from the Hub.

    Raises FileNotFoundError if there is none.
    """
    if not config.llm:
        raise FileNotFoundError("no LLM given; set --llm PATH_OR_HUB_ID")
    if not Path(config.llm).is_dir() and config.llm in SHAPES:
        return LlamaConfig(**SHAPES[config.llm])
    try:
        if not Path(config.llm).is_dir():
            check_hub_answers(config.llm, revision=config.revision or None)
        return AutoConfig.from_pretrained(config.llm, revision=config.revision or None)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no config.json for LLM {config.llm!r}, local or on the Hub: {reason}") from error


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
    settings: PretrainedConfig, config: EncoderConfig, lora: LoraSettings, precision: str, *, last_blocks: int = 0
) -> LlmShape:
    """The LLM up to the pooled layer with its adapter, reduced to its last ``last_blocks`` blocks if that is not 0.

    Raises ValueError for a model that isn't a decoder, and for a layer or LoRA target that it doesn't have.
    """
    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    set_attention(settings, config.attention)
    # "auto" is bfloat16 on GPUs; precision is the adapter's, and bf16 and fp16 are the LLM's too
    dtype = COMPUTE.get(config.compute_dtype, torch.bfloat16) if precision == "fp32" else DTYPES[precision]
    with torch.device("meta"):
        llm = AutoModel.from_config(settings, dtype=dtype)
        llm = llm if text is settings else llm.language_model
        if not is_decoder(llm):
            raise ValueError(
                f"{config.llm} is a {type(llm).__name__}; expected a decoder such as Llama, Qwen, Mistral or Gemma"
            )
        keep_layers(llm, config.layer)
        set_kernels(llm, config.attention)
        blocks = llm.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        depth = len(blocks)
        if last_blocks:
            del blocks[: max(0, depth - last_blocks)]
        llm.requires_grad_(False)
        parameters = sum(p.numel() for p in llm.parameters())
        linear = sum(p.weight.numel() for p in llm.modules() if isinstance(p, nn.Linear))
        quantized = linear if config.load_in_4bit else 0
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
        frozen_bytes=(parameters - quantized) * dtype.itemsize + quantized * NF4_BYTES,
        adapted=tuple(sorted(adapted)),
    )
