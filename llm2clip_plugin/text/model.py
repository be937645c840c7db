"""The LLM with its pooling: tokens in, one embedding a caption out.

Shape letters: B captions, T tokens, H hidden width, W embedding width (= H).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from llm2clip_plugin.text.foreign import is_sentence_transformers
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.tokens import Batch


def pool(hidden_BTH: torch.Tensor, pool_mask_BT: torch.Tensor, kind: str) -> torch.Tensor:
    """(B, H) float32: the mean over the marked tokens, or the last of them."""
    if kind == "mean":
        weights_BT = pool_mask_BT / pool_mask_BT.sum(dim=1, keepdim=True)
        # where, not a product alone: 0 x inf of a padded position would be NaN
        kept_BTH = torch.where(pool_mask_BT[..., None], hidden_BTH, 0).float()
        return torch.einsum("bth,bt->bh", kept_BTH, weights_BT)
    positions_T = torch.arange(pool_mask_BT.shape[1], device=pool_mask_BT.device)
    last_B = torch.where(pool_mask_BT, positions_T, -1).amax(dim=1)
    return hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B].float()


class CaptionModel(nn.Module):
    """A decoder LLM without its head, pooled. ``forward(batch)`` is differentiable; training and embedding share it.

    ``decoder`` False: a sentence-transformers encoder, which counts positions its own way, from the first column.
    """

    def __init__(self, llm: nn.Module, pooling: str, *, decoder: bool = True) -> None:
        super().__init__()
        self.llm = llm
        self.pooling = pooling
        self.decoder = decoder

    def forward(self, batch: Batch) -> torch.Tensor:
        """(B, W) float32 embeddings, not normalised."""
        own = {"position_ids": batch.position_ids, "use_cache": False} if self.decoder else {}
        outputs = self.llm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **own)
        hidden_BTH = outputs.last_hidden_state
        return pool(hidden_BTH, batch.pool_mask, self.pooling)


def load_backbone(folder: Path, config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The LLM's blocks up to the pooled layer, in evaluation mode.

    Raises ValueError for a model that is no decoder, or a layer that it doesn't have.
    """
    settings = AutoConfig.from_pretrained(folder)
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    settings.is_causal = text.is_causal = config.attention == "causal"
    extra = {}
    if config.load_in_4bit:
        extra = {"quantization_config": nf4(dtype), "device_map": {"": device}}
    with only_errors():  # the report of a head that we don't load
        model, report = AutoModel.from_pretrained(
            folder, config=settings, dtype=dtype, output_loading_info=True, **extra
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"{folder} lacks {len(wrong)} weights of a {type(model).__name__}: {', '.join(wrong[:5])} ...")
    if text is not settings:  # a multimodal model: its language part
        model = model.language_model
    if is_decoder(model):
        keep_layers(model, config.layer)
    elif not is_sentence_transformers(folder) or config.layer != -1 or config.adapter:
        kind = type(model).__name__
        raise ValueError(
            f"{folder} is a {kind}; expected a decoder LLM such as Llama, Qwen, Mistral or Gemma, or a "
            "sentence-transformers folder (last layer, no adapter)"
        )
    if config.load_in_4bit:
        mend_4bit_on_cpu(model)
        return model.eval()
    nn.Module.to(model, device)
    return model.eval()


def is_decoder(model: nn.Module) -> bool:
    """Whether a model is built as Hugging Face's decoders are."""
    return {"layers", "embed_tokens", "norm"} <= {name for name, _ in model.named_children()}


@contextmanager
def only_errors() -> Iterator[None]:
    """transformers' warnings and bars silenced."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def keep_layers(model: PreTrainedModel, layer: int) -> None:
    """Drop the blocks above hidden state ``layer``; below the last, the state is taken before any final norm."""
    blocks = model.get_submodule("layers")
    assert isinstance(blocks, nn.ModuleList)
    depth = len(blocks)
    kept = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= kept <= depth:
        raise ValueError(
            f"layer {layer} is not one of the model's hidden states: 0 (embeddings) to {depth}, or -1 to {-depth - 1}"
        )
    if layer != -1 and kept < depth:
        model.set_submodule("layers", blocks[:kept])
        model.set_submodule("norm", nn.Identity())
        model.config.num_hidden_layers = kept


def refuse_length_dependent_rope(text_config, max_tokens: int) -> None:
    """Rotary embeddings that change with the longest sequence of a batch would make embeddings depend on the batch."""
    scaling = vars(text_config).get("rope_parameters") or {}
    for rope in (scaling, *(value for value in scaling.values() if isinstance(value, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limit = rope.get("original_max_position_embeddings") or text_config.max_position_embeddings
            if max_tokens > limit:
                raise ValueError(
                    f"max_tokens {max_tokens} is beyond {limit}, where this model's {rope['rope_type']} positions "
                    f"change with the batch; set max_tokens to {limit} or less"
                )


def nf4(dtype: torch.dtype):
    """bitsandbytes' settings: NF4 weights, double quantisation, computation in ``dtype``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def mend_4bit_on_cpu(model: nn.Module) -> None:
    """Keep bitsandbytes off its packed CPU kernel, which fails in evaluation for widths that 32 does not divide."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
