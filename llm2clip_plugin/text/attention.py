"""Which tokens an LLM's blocks attend to: made bidirectional or causal, and probed when the LLM is loaded.

Shape letters: B rows, T tokens, H hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """Raise ValueError if a block of a bidirectional LLM is causal, or if padding changes the states of other tokens.

    A forward pass of a few tokens with and without padding, and a backward pass, block by block: the state of the first
    token must have a gradient with respect to those of the later ones. Gradients are exact zeros in a causal block,
    while differences of states would drown in the rounding of half precision.
    """
    vocabulary = model.config.vocab_size
    ids_BT = (torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS) * 7 + 11) % vocabulary
    with block_passes(model) as passes, torch.enable_grad():
        plain_BTH = last_states(model, ids_BT, padding=0)
    with torch.no_grad():
        padded_BTH = last_states(model, ids_BT, padding=PADDING)[:, :TOKENS]
    name = type(model).__name__
    if not bool(padded_BTH.isfinite().all()):
        raise ValueError(
            f"{where} is a {name}, whose states are not finite in {model.dtype}: its weights are damaged, or too large "
            "for float16; copy the LLM again, or set --compute-dtype bfloat16 or float32"
        )
    if attention == "bidirectional" and (causal := causal_blocks(passes)):
        kinds = getattr(model.config, "layer_types", None) or ["causal"] * len(passes)
        named = ", ".join(f"{number} ({kinds[number]})" for number in causal[:4]) + (", ..." if len(causal) > 4 else "")
        raise ValueError(
            f"{where} is a {name}, in which {len(causal)} of {len(passes)} blocks cannot attend to later tokens: "
            f"{named}. Set --attention causal, or use an LLM with attention in all blocks ({WORKING})"
        )
    difference_BT = (plain_BTH - padded_BTH).norm(dim=-1) / plain_BTH.norm(dim=-1)
    typical, allowed = float(difference_BT.median()), TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if typical > allowed:
        raise ValueError(
            f"{where} is a {name}, whose states change by {typical:.2g} of their norm if the batch has padding (at "
            f"most {allowed} is rounding): an embedding would depend on its batch. Use another LLM ({WORKING})"
        )


def last_states(model: PreTrainedModel, ids_BT: Tensor, *, padding: int) -> Tensor:
    """(B, T + padding, H) of rows that are padded on the right."""
    padded_BT = nn.functional.pad(ids_BT, (0, padding))
    mask_BT = nn.functional.pad(torch.ones_like(ids_BT), (0, padding))
    positions_BT = torch.arange(padded_BT.shape[1], device=ids_BT.device).expand_as(padded_BT)
    out = model(input_ids=padded_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False)
    return out.last_hidden_state.detach().float()


@contextmanager
def block_passes(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of each block in the forward passes inside, each block with a graph of its own."""
    passes: list[tuple[Tensor, Tensor]] = []
    leaves: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        leaves.append(hidden.detach().requires_grad_())
        return (leaves[-1], *args[1:]) if args else args, kwargs if args else {**kwargs, "hidden_states": leaves[-1]}

    def after(block: nn.Module, args: Any, output: Any) -> None:
        passes.append((leaves[-1], output[0] if isinstance(output, tuple) else output))

    hooks = []
    for block in model.get_submodule("layers").children():
        hooks += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.enable_grad()  # the caller may have turned gradients off
def causal_blocks(passes: list[tuple[Tensor, Tensor]]) -> list[int]:
    """Numbers of the blocks in which the first token reaches the last, but not the last the first.

    Row 0 gives the gradient of its first token's state, row 1 that of its last one's. A block in which tokens do not
    meet at all (an MLP) is not causal.
    """
    numbers = [number for number, (_, output) in enumerate(passes) if output.requires_grad]
    if not numbers:
        return []
    inputs, outputs = zip(*(passes[number] for number in numbers), strict=True)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), device=outputs[0].device)
    for output in outputs:
        weights_H = torch.randn(output.shape[-1], generator=generator).to(output.device)  # so that nothing cancels
        total = total + (output[..., 0, 0, :] * weights_H).sum() + (output[..., 1, -1, :] * weights_H).sum()
    grads = torch.autograd.grad(total, inputs)
    sees_later = [bool(grad[..., 0, 1:, :].any()) for grad in grads]
    sees_earlier = [bool(grad[..., 1, :-1, :].any()) for grad in grads]
    return [n for n, later, earlier in zip(numbers, sees_later, sees_earlier, strict=True) if earlier and not later]
