"""Which tokens an LLM's blocks attend to: made bidirectional or causal, and probed when the LLM is loaded.

Shape letters: B rows, T tokens, H hidden width.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 6  # of the probe; below every sliding window
PADDING = 3  # padding tokens of its second pass
# difference between the states of padded and unpadded tokens, as a fraction of their norm: rounding stays far below,
# another kind of attention is far above
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.1
WORKING = "Llama, Qwen 2 and 3, Mistral, Gemma 1 to 3, Phi-3, OLMo, StableLM, Nemotron"


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
