"""The LLM and its pooling: a batch of tokens in, one embedding per caption out.

Shape letters: B captions, T tokens, H hidden width, W embedding width (= H).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from llm2clip_plugin.lazy_compile import BITSANDBYTES, import_without_compiler
from llm2clip_plugin.outside.values import errors_about
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.text.attention import check_attention, set_attention, set_kernels
from llm2clip_plugin.text.sentence_transformers import is_sentence_transformers
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.tokens import Batch


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
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(
            f"{folder} is not a complete {type(model).__name__}: {len(names)} weights are missing or misshapen: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        )
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

    import_without_compiler(BITSANDBYTES)
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
