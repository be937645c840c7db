"""The LLM and its pooling: a batch of tokens in, one embedding per caption out; its attention, probed; its shape.

Shape letters: B captions, T tokens, H hidden width, W embedding width (= H).
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig, PreTrainedModel

from llm2clip_plugin.console import quiet_transformers
from llm2clip_plugin.files import check_hub_answers, errors_about
from llm2clip_plugin.text.adapter import add_lora
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings, is_sentence_transformers
from llm2clip_plugin.text.tokens import Batch
from llm2clip_plugin.train.model import DTYPES

TOKENS = 6  # of the probe; below every sliding window
PADDING = 3  # padding tokens of its second pass
# difference between the states of padded and unpadded tokens, as a fraction of their norm: rounding stays far below,
# another kind of attention is far above
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.1
WORKING = "Llama, Qwen 2 and 3, Mistral, Gemma 1 to 3, Phi-3, OLMo, StableLM, Nemotron"


class CaptionModel(nn.Module):
    """An LLM without its language head, and pooling; differentiable, shared by training and embedding.

    ``decoder``: False for a sentence-transformers encoder, which numbers positions itself, from the first column.
    """

    def __init__(self, llm: nn.Module, pooling: str, *, decoder: bool = True) -> None:
        super().__init__()
        self.llm = llm
        self.pooling = pooling
        self.decoder = decoder
        self.autocast: torch.dtype | None = None  # of products in the LLM, see text.adapter.autocast_adapter

    def forward(self, batch: Batch) -> torch.Tensor:
        """(B, W) float32 embeddings, not normalized."""
        options = {"position_ids": batch.position_ids, "use_cache": False} if self.decoder else {}
        with torch.autocast(batch.input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            outputs = self.llm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        return pool(outputs.last_hidden_state, batch.pool_mask, self.pooling)


def pool(hidden_BTH: torch.Tensor, pool_mask_BT: torch.Tensor, kind: str) -> torch.Tensor:
    """(B, T, H), (B, T) bool -> (B, H) float32: the mean over the marked tokens (kind "mean") or the last of them."""
    if kind == "mean":
        weights_BT = pool_mask_BT / pool_mask_BT.sum(dim=1, keepdim=True)
        # where, not a mere product: 0 x inf of a padded position would be NaN
        pooled_BTH = torch.where(pool_mask_BT[..., None], hidden_BTH, 0).float()
        return torch.einsum("bth,bt->bh", pooled_BTH, weights_BT)
    positions_T = torch.arange(pool_mask_BT.shape[1], device=pool_mask_BT.device)
    last_B = torch.where(pool_mask_BT, positions_T, -1).amax(dim=1)
    return hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B].float()


def load_backbone(folder: Path, config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The LLM's blocks up to the pooled layer, in evaluation mode.

    Raises ValueError for missing weights, a model that is not a decoder or cannot attend as configured, or a layer out
    of range.
    """
    with errors_about(folder / "config.json", fix="download or copy the LLM again"):
        settings = AutoConfig.from_pretrained(folder)
    if getattr(settings, "quantization_config", None):
        raise ValueError(
            f"{folder} is saved quantized, and LoRA, merging and its fingerprint need the original weights; take the "
            "model that it was made from, with --load-in-4bit if memory is short"
        )
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    set_attention(settings, config.attention)
    # tensor by tensor to the device: the ranks of a machine share the file's pages, and none holds a copy of the LLM
    extra: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if config.load_in_4bit:
        extra = {"quantization_config": nf4(dtype), "device_map": {"": device}}
    with quiet_transformers():  # it warns about the language head, which is left out on purpose
        model, report = AutoModel.from_pretrained(
            folder, config=settings, dtype=dtype, output_loading_info=True, **extra
        )
    refuse_incomplete(model, report, folder)
    if text is not settings:  # a multimodal model: its language part
        model = model.language_model
    decoder = is_decoder(model)
    if decoder:
        keep_layers(model, config.layer)
        set_kernels(model, config.attention)
    elif not is_sentence_transformers(folder) or config.layer != -1 or config.adapter:
        raise ValueError(
            f"{folder} is a {type(model).__name__}; expected a decoder LLM such as Llama, Qwen, Mistral or Gemma, or a "
            "sentence-transformers folder (with layer -1 and no adapter)"
        )
    if config.load_in_4bit:
        avoid_packed_cpu_kernel(model)
    else:
        nn.Module.to(model, device)
    model.eval()
    if decoder:
        check_attention(model, config.attention, where=str(folder))
    return model


def refuse_incomplete(model: nn.Module, report: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if weights were missing, by the loading report of transformers."""
    if names := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(
            f"{folder} is not a complete {type(model).__name__}: {len(names)} weights are missing or misshapen: "
            f"{', '.join(names[:5])}"
        )


def is_decoder(model: nn.Module) -> bool:
    """Whether a model has the parts of a Hugging Face decoder."""
    return {"layers", "embed_tokens", "norm"} <= {name for name, _ in model.named_children()}


def keep_layers(model: PreTrainedModel, layer: int) -> None:
    """Drop the blocks above hidden state ``layer``; below the last block there is no final norm.

    Raises ValueError for a layer out of range.
    """
    blocks = model.get_submodule("layers")
    assert isinstance(blocks, nn.ModuleList)
    depth = len(blocks)
    count = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= count <= depth:
        raise ValueError(
            f"layer {layer} is out of range: hidden states are 0 (embeddings) to {depth}, or -{depth + 1} to -1"
        )
    if layer != -1 and count < depth:
        model.set_submodule("layers", blocks[:count])
        model.set_submodule("norm", nn.Identity())
        model.config.num_hidden_layers = count


def refuse_length_dependent_rope(text_config, max_tokens: int) -> None:
    """Raise ValueError if rotary embeddings change with the batch's longest sequence within ``max_tokens``.

    An embedding would then depend on the other captions of its batch.
    """
    scaling = vars(text_config).get("rope_parameters") or {}
    for rope in (scaling, *(value for value in scaling.values() if isinstance(value, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limit = rope.get("original_max_position_embeddings") or text_config.max_position_embeddings
            if max_tokens > limit:
                raise ValueError(
                    f"max_tokens is {max_tokens}, but beyond {limit} tokens this model's {rope['rope_type']} RoPE "
                    f"depends on the batch; set max_tokens to {limit} or less"
                )


def nf4(dtype: torch.dtype):
    """bitsandbytes' settings: NF4 weights, double quantization, computation in ``dtype``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def avoid_packed_cpu_kernel(model: nn.Module) -> None:
    """Turn off bitsandbytes' packed CPU kernel, which fails in evaluation for widths that are not multiples of 32."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def set_attention(settings: PretrainedConfig, attention: str) -> None:
    """Make a model that is built from ``settings`` bidirectional or causal; ``set_kernels`` completes it."""
    settings.is_causal = settings.get_text_config().is_causal = attention == "causal"


def set_kernels(model: nn.Module, attention: str) -> None:
    """Make the attention layers bidirectional, too: for a batch without padding a model makes no mask, and then the
    layer's own flag decides. Most models override it with the configuration's, StableLM and Nemotron do not."""
    if attention == "bidirectional":
        for module in model.modules():
            if isinstance(getattr(module, "is_causal", None), bool):
                module.is_causal = False  # type: ignore[assignment]


def check_attention(model: PreTrainedModel, attention: str, *, where: str) -> None:
    """Raise ValueError if a block of a bidirectional LLM is causal, or if padding changes other tokens' states."""
    ids_BT = (torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS) * 7 + 11) % model.config.vocab_size
    plain_BTH, padded_BTH = _states(model, ids_BT, 0), _states(model, ids_BT, PADDING)[:, :TOKENS]
    name = type(model).__name__
    if not bool(padded_BTH.isfinite().all()):
        raise ValueError(
            f"{where} is a {name}, whose states are not finite in {model.dtype}: its weights are damaged, or too large "
            "for float16; copy the LLM again, or set --compute-dtype bfloat16 or float32"
        )
    if attention == "bidirectional" and (causal := causal_blocks(model, ids_BT)):
        raise ValueError(
            f"{where} is a {name}, whose blocks {', '.join(map(str, causal))} cannot attend to later tokens. Set "
            f"--attention causal, or use an LLM with attention in all blocks ({WORKING})"
        )
    difference_BT = (plain_BTH - padded_BTH).norm(dim=-1) / plain_BTH.norm(dim=-1)
    typical, allowed = float(difference_BT.median()), TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if typical > allowed:
        raise ValueError(
            f"{where} is a {name}, whose states change by {typical:.2g} of their norm if the batch has padding (at "
            f"most {allowed} is rounding): an embedding would depend on its batch. Use another LLM ({WORKING})"
        )


@torch.no_grad()
def _states(model: PreTrainedModel, ids_BT: Tensor, padding: int) -> Tensor:
    """(B, T + padding, H) of rows that are padded on the right."""
    padded_BT = nn.functional.pad(ids_BT, (0, padding))
    mask_BT = nn.functional.pad(torch.ones_like(ids_BT), (0, padding))
    positions_BT = torch.arange(padded_BT.shape[1], device=ids_BT.device).expand_as(padded_BT)
    out = model(input_ids=padded_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False)
    return out.last_hidden_state.float()


@torch.enable_grad()  # the caller may have turned gradients off
def causal_blocks(model: PreTrainedModel, ids_BT: Tensor) -> list[int]:
    """Numbers of the blocks in which the first token's state has no gradient with respect to those of later tokens.

    Block by block: these gradients are exact zeros in a causal block, while differences of states would drown in the
    rounding of half precision.
    """
    calls = []
    hooks = [
        block.register_forward_pre_hook(
            lambda block, args, kwargs: calls.append((block, args, dict(kwargs))), with_kwargs=True
        )
        for block in model.get_submodule("layers").children()
    ]
    _states(model, ids_BT, 0)
    for hook in hooks:
        hook.remove()
    causal = []
    for number, (block, args, kwargs) in enumerate(calls):
        hidden_BTH = (args[0] if args else kwargs.pop("hidden_states")).detach().requires_grad_()
        output = block(hidden_BTH, *args[1:], **kwargs)
        first_BH = (output[0] if isinstance(output, tuple) else output)[:, 0]
        weights_H = torch.arange(first_BH.shape[-1], device=first_BH.device)  # so that nothing cancels
        (grad_BTH,) = torch.autograd.grad((first_BH * weights_H).sum(), hidden_BTH)
        if not grad_BTH[:, 1:].any():
            causal.append(number)
    return causal


def default_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def fastest_dtype(device: torch.device, width: int = 1024) -> torch.dtype:
    """bfloat16 on a GPU that supports it, else float16; on a CPU the faster of float32 and bfloat16, measured in 0.2 s.

    CPUs differ by a factor of ten in bfloat16, in either direction, and their CPU flags do not show which.
    """
    if device.type != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    rates = {dtype: _matmul_rate(dtype, width) for dtype in (torch.float32, torch.bfloat16)}
    return max(rates, key=lambda dtype: rates[dtype])


def _matmul_rate(dtype: torch.dtype, width: int, seconds: float = 0.1) -> float:
    """Products per second of (256, width) @ (width, width) on the CPU."""
    left, right = torch.randn(256, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    product = torch.mm(left, right)  # the first call picks a kernel
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        torch.mm(left, right, out=product)
        count += 1
    return count / passed


# The LLM's shape from its config.json alone, for plans.

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
