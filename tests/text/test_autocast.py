"""An fp32 adapter on a bf16 LLM: products in bf16, weights and gradients in fp32, less memory."""

from pathlib import Path

import torch
from text_helpers import moved

from llm2clip_plugin.stages.settings import FinetuneConfig
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder

CAPTIONS = ["two dogs run over the wet grass", "a red bicycle leans against a brick wall", "a boat", "the lake"]


def pass_through(
    llm: Path, dtype: str, *, autocast: bool, dora: bool = False
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Embeddings, all gradients of the adapter, and the bytes that the forward pass kept for them."""
    encoding = EncoderConfig(llm=str(llm), compute_dtype=dtype)
    config = FinetuneConfig(encoder=encoding, lora=LoraSettings(r=4, dropout=0.0, dora=dora))
    encoder = CaptionEncoder(encoding, "cpu", trainable_adapter=True)
    module = moved(encoder, config)
    assert (encoder.model.autocast is torch.bfloat16) is (dtype == "bfloat16" and not dora)
    if not autocast:
        encoder.model.autocast = None
        for layer in module.modules():
            layer.cast_input_dtype_enabled = True
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = encoder.tokenize(CAPTIONS)
    batch = encoder.collate(rows, [encoder.frame] * len(rows))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = encoder.model(batch)
    (embeddings * torch.linspace(-1, 1, embeddings.shape[1])).sum().backward()
    grads = [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(grad.dtype == torch.float32 for grad in grads)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in weights)
    return embeddings.detach(), torch.cat([grad.flatten() for grad in grads]), bytes_kept


def test_products_in_bfloat16_give_the_gradients_of_float32(llama: Path) -> None:
    """bf16 rounds to 2^-9: the LLM's own rounding is as large as the adapter's."""
    exact, exact_grad, _ = pass_through(llama, "float32", autocast=True)
    mixed, mixed_grad, mixed_bytes = pass_through(llama, "bfloat16", autocast=False)
    half, half_grad, half_bytes = pass_through(llama, "bfloat16", autocast=True)

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual - expected).norm() / expected.norm())

    assert error(half, exact) < 1.5 * error(mixed, exact) + 1e-3 < 0.05
    assert error(half_grad, exact_grad) < 1.5 * error(mixed_grad, exact_grad) + 1e-3 < 0.1
    assert half_bytes < 0.8 * mixed_bytes


def test_dora_keeps_its_products(llama: Path) -> None:
    pass_through(llama, "bfloat16", autocast=True, dora=True)
