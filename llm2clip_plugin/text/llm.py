"""Captions to tokens, and tokens to embeddings: template and prompt, batches, the LLM and its
pooling, its shape.

Shape letters: B captions of a batch, T tokens of its longest, H hidden width, W embedding width (=
H).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hub import check_hub_answers
from llm2clip_plugin.pretrained import open_pretrained
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.frames import CAPTION
from llm2clip_plugin.vision.directory import refused_pickle, weight_files

# its token ids identify a tokenizer
PROBE_TEXT = "A red-and-white café sign, 3:45 pm; 红色的猫 кот ねこ قط 🐈"
# of templates that contain the date, as Llama 3's; an embedding must not depend on the day
DAY = "26 Jul 2024"
# in place of transformers' function
TODAY = f"{{% macro strftime_now(form) %}}{DAY}{{% endmacro %}}"


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch of token ids, and which of them are pooled."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on tokens
    position_ids: Tensor  # (B, T) int64, from 0 at each caption's first token
    pool_mask: Tensor  # (B, T) bool, True on tokens that are pooled


def literal_template(tokenizer, chat_template: str) -> str:
    """The chat template as a text with {caption} in it; "" for none.

    Raises ValueError if the tokenizer has no chat template, or one that changes the user's text.
    """
    if chat_template != "user":
        return chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template; set one: '<|user|>{CAPTION}<|end|>'"
        )
    turn = [{"role": "user", "content": CAPTION}]
    template = TODAY + tokenizer.get_chat_template()
    where = f"the chat template of {tokenizer.name_or_path}"
    with errors_about(where, fix="copy the LLM's tokenizer again"):
        text = tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, date_string=DAY
        )
    if text.count(CAPTION) != 1:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} changes or repeats the user's text: "
            f"{text!r}"
        )
    return text


def length_batches(
    lengths: Sequence[int], tokens_per_batch: int
) -> Iterator[list[int]]:
    """Batches of indices, longest rows first, each of at most ``tokens_per_batch`` tokens, padding
    included.

    Then a lack of memory shows at once, and the estimate of the time left is not too low.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while order:
        count = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        yield order[:count]
        del order[:count]


# The LLM, and its pooling.

# of the probe of attention; below every sliding window
TOKENS = 6
PADDING = 3
WORKING = "Llama, Qwen 2 and 3, Mistral, Gemma 1 to 3, Phi-3, OLMo, StableLM, Nemotron"


class CaptionModel(nn.Module):
    """An LLM without its language head, and pooling; differentiable, shared by training and
    embedding."""

    def __init__(self, llm: nn.Module, pooling: str) -> None:
        super().__init__()
        self.llm = llm
        self.pooling = pooling
        # of products in the LLM, see text.encoder.autocast_adapter
        self.autocast: torch.dtype | None = None

    def forward(self, batch: TokenBatch) -> Tensor:
        """(B, W) float32 embeddings, not normalized."""
        device = batch.input_ids.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            outputs = self.llm(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return pool(outputs.last_hidden_state, batch.pool_mask, self.pooling)


def pool(hidden_BTH: Tensor, pool_mask_BT: Tensor, kind: str) -> Tensor:
    """(B, T, H), (B, T) bool -> (B, H) float32: the mean over the marked tokens (kind "mean") or
    the last of them."""
    if kind == "mean":
        weights_BT = pool_mask_BT / pool_mask_BT.sum(dim=1, keepdim=True)
        # where, not a mere product: 0 x inf of a padded position would be NaN
        pooled_BTH = torch.where(pool_mask_BT[..., None], hidden_BTH, 0).float()
        return torch.einsum("bth,bt->bh", pooled_BTH, weights_BT)
    positions_T = torch.arange(pool_mask_BT.shape[1], device=pool_mask_BT.device)
    last_B = torch.where(pool_mask_BT, positions_T, -1).amax(dim=1)
    return hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B].float()


def load_backbone(
    folder: Path, config: EncoderConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The LLM's blocks up to the pooled layer, in evaluation mode.

    Raises ValueError for missing weights, a model that is no decoder or cannot attend as
    configured, an unknown layer.
    """
    settings = read_config(folder, config)
    if getattr(settings, "quantization_config", None):
        raise ValueError(
            f"{folder} is saved quantized, take the original model, perhaps with --load-in-4bit"
        )
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    set_attention(settings, config.attention)
    options: dict[str, Any] = {"config": settings, "dtype": dtype}
    if device.type != "cpu" or config.load_in_4bit:
        # tensor by tensor to the device: ranks of a machine share the file's pages, and none holds
        # a copy of the LLM
        options["device_map"] = {"": device}
    if config.load_in_4bit:
        from transformers import BitsAndBytesConfig

        nf4: dict[str, Any] = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4
        )
    model = load_whole(
        AutoModel, folder, trust_remote_code=config.trust_remote_code, **options
    )
    if text is not settings:  # a multimodal model: its language part
        model = model.language_model
    model.eval()
    for module in model.modules() if config.load_in_4bit else ():
        # bitsandbytes' kernel for widths that are multiples of 32
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    keep_layers(model, config.layer)
    set_kernels(model, config.attention)
    check_attention(model, config.attention, where=str(folder))
    return model


def read_config(folder: Path, config: EncoderConfig) -> PretrainedConfig:
    """config.json of an LLM's folder; raises ContractError if it is damaged."""
    with errors_about(folder / "config.json", fix="download or copy the LLM again"):
        return open_pretrained(
            AutoConfig, folder, trust_remote_code=config.trust_remote_code
        )


def load_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """``kind.from_pretrained``; raises ValueError for missing weights, which transformers would
    draw at random."""
    advice = "its weights must be those of its config.json; copy the model again"
    try:
        # it warns about a language head, which is left out on purpose
        with quiet_transformers(), errors_about(folder, fix=advice):
            model, report = open_pretrained(
                kind, folder, output_loading_info=True, **options
            )
    except ContractError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise refused_pickle(weight_files(folder)[0], error.__cause__) from error
        raise
    names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if names:
        listed = ", ".join(names[:5])
        raise ValueError(
            f"{folder} is not a complete {type(model).__name__}: "
            f"{len(names)} weights missing: {listed}"
        )
    return model


def keep_layers(model: PreTrainedModel, layer: int) -> None:
    """Drop the blocks above hidden state ``layer``, and the final norm below the last.

    Raises ValueError for another state, and for a model without the parts of a Hugging Face
    decoder.
    """
    if not {"layers", "embed_tokens", "norm"} <= {
        name for name, _ in model.named_children()
    }:
        raise ValueError(
            f"{model.name_or_path} is a {type(model).__name__}; expected a decoder LLM ({WORKING})"
        )
    blocks = model.get_submodule("layers")
    assert isinstance(blocks, nn.ModuleList)
    depth = len(blocks)
    count = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= count <= depth:
        raise ValueError(
            f"layer {layer} is out of range: states are 0 (embeddings) to {depth}, "
            f"or -{depth + 1} to -1"
        )
    if layer != -1 and count < depth:
        model.set_submodule("layers", blocks[:count])
        model.set_submodule("norm", nn.Identity())
        model.config.num_hidden_layers = count


def refuse_length_dependent_rope(text_config, max_tokens: int) -> None:
    """Raise ValueError if rotary embeddings change with the batch's longest sequence within
    ``max_tokens``."""
    scaling = vars(text_config).get("rope_parameters") or {}
    # by kind of layer
    nested = [value for value in scaling.values() if isinstance(value, dict)]
    for rope in (scaling, *nested):
        limit = rope.get("original_max_position_embeddings")
        if not limit:
            limit = getattr(text_config, "max_position_embeddings", 0)
        kind = rope.get("rope_type")
        if kind in ("longrope", "dynamic") and max_tokens > limit:
            raise ValueError(
                f"max_tokens is {max_tokens}, "
                f"but beyond {limit} tokens {kind} RoPE depends on the batch"
            )


def set_attention(settings: PretrainedConfig, attention: str) -> None:
    """Make a model that is built from ``settings`` bidirectional or causal; ``set_kernels``
    completes it."""
    settings.is_causal = settings.get_text_config().is_causal = attention == "causal"


def set_kernels(model: nn.Module, attention: str) -> None:
    """Make the attention layers bidirectional, too: StableLM's and Nemotron's own flag decides if
    nothing is padded."""
    if attention == "bidirectional":
        for module in model.modules():
            if isinstance(getattr(module, "is_causal", None), bool):
                module.is_causal = False  # type: ignore[assignment]


def check_attention(model: PreTrainedModel, attention: str, *, where: str) -> None:
    """Raise ValueError if a block of a bidirectional LLM is causal, or if padding changes other
    tokens' states."""
    numbers_BT = torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS)
    ids_BT = (numbers_BT * 7 + 11) % model.config.vocab_size
    # of rounding they differ far less than the tolerances below, of another kind of attention far
    # more
    plain_BTH = _states(model, ids_BT, 0)
    padded_BTH = _states(model, ids_BT, PADDING)[:, :TOKENS]
    difference_BT = (plain_BTH - padded_BTH).norm(dim=-1) / plain_BTH.norm(dim=-1)
    typical = float(difference_BT.median())
    allowed = 1e-3 if model.dtype == torch.float32 else 0.1
    if not bool(padded_BTH.isfinite().all()):
        problem = (
            f"states are not finite in {model.dtype}; "
            "copy the LLM again, or set --compute-dtype bfloat16"
        )
    elif attention == "bidirectional" and (causal := causal_blocks(model, ids_BT)):
        numbers = ", ".join(map(str, causal))
        problem = (
            f"blocks {numbers} cannot attend to later tokens; "
            f"set --attention causal, or use {WORKING}"
        )
    elif typical > allowed:
        problem = (
            f"states change by {typical:.2g} of their norm if the "
            f"batch has padding; use {WORKING}"
        )
    else:
        return
    raise ValueError(f"{where} is a {type(model).__name__}, whose {problem}")


@torch.no_grad()
def _states(model: PreTrainedModel, ids_BT: Tensor, padding: int) -> Tensor:
    """(B, T + padding, H) of rows that are padded on the right."""
    padded_BT = nn.functional.pad(ids_BT, (0, padding))
    mask_BT = nn.functional.pad(torch.ones_like(ids_BT), (0, padding))
    positions_BT = torch.arange(padded_BT.shape[1], device=ids_BT.device).expand_as(
        padded_BT
    )
    out = model(
        input_ids=padded_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        use_cache=False,
    )
    return out.last_hidden_state.float()


@torch.enable_grad()  # the caller may have turned gradients off
def causal_blocks(model: PreTrainedModel, ids_BT: Tensor) -> list[int]:
    """Numbers of the blocks in which the first token's state has no gradient with respect to those
    of later tokens.

    Block by block: these gradients are exact zeros in a causal block, while differences of states
    would drown in the rounding of half precision.
    """
    calls = []

    def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((block, args, dict(kwargs)))

    blocks = model.get_submodule("layers").children()
    hooks = [
        block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks
    ]
    _states(model, ids_BT, 0)
    for hook in hooks:
        hook.remove()
    causal = []
    for number, (block, args, kwargs) in enumerate(calls):
        hidden_BTH = (
            (args[0] if args else kwargs.pop("hidden_states")).detach().requires_grad_()
        )
        output = block(hidden_BTH, *args[1:], **kwargs)
        first_BH = (output[0] if isinstance(output, tuple) else output)[:, 0]
        # so that nothing cancels
        weights_H = torch.arange(first_BH.shape[-1], device=first_BH.device)
        (grad_BTH,) = torch.autograd.grad((first_BH * weights_H).sum(), hidden_BTH)
        if not grad_BTH[:, 1:].any():
            causal.append(number)
    return causal


# The LLM's config.json alone, for plans.

LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# gated on the Hub: their config.json needs a login
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B-Instruct": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
    },
}


def llm_config(config: EncoderConfig) -> PretrainedConfig:
    """The LLM's configuration: of its folder, SHAPES, or from the Hub. FileNotFoundError if there
    is none."""
    if not config.llm:
        raise FileNotFoundError("no LLM given; set --llm PATH_OR_HUB_ID")
    local = Path(config.llm).is_dir()
    if not local and config.llm in SHAPES:
        return LlamaConfig(**LLAMA_3, **SHAPES[config.llm])
    try:
        if not local:
            check_hub_answers(config.llm, revision=config.revision or None)
        options = {
            "revision": config.revision or None,
            "trust_remote_code": config.trust_remote_code,
        }
        return open_pretrained(AutoConfig, config.llm, **options)
    except ContractError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no config.json for LLM {config.llm!r}, local or on the Hub: {reason}"
        ) from error
