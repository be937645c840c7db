"""Compare what two models compute on fixed inputs, and a written tower directory with the model it was written from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.family import Tower, tower_in
from llm2clip_plugin.vision.towers import load_tower

# The same code with the same weights: only nondeterministic kernels can differ.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def probe_images(tower: Tower, *, count: int = 2) -> Tensor:
    """Random images from a fixed seed, (count, 3, S, S) in the tower's dtype and on its device."""
    size = tower.config.image_size
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return pixels.to(device=tower.device, dtype=tower.dtype)


def probe_features(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a tower or dual encoder computes for two random images and three random LLM embeddings."""
    tower = tower_in(model)
    pixels = probe_images(tower)
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
        features = {f"hidden_states[{i}]": state for i, state in enumerate(output.hidden_states)}
        features["last_hidden_state"] = output.last_hidden_state
        if output.pooler_output is not None:
            features["pooler_output"] = output.pooler_output
        if isinstance(model, DualEncoder):
            features["encode_image"] = model.encode_image(pixels)
            if model.text_adapter is not None:
                embeddings = torch.randn(3, model.config.llm_width, generator=torch.Generator().manual_seed(0))
                features["encode_text"] = model.encode_text(embeddings.to(tower.device))
    return features


def compare_features(expected: dict[str, Tensor], actual: dict[str, Tensor], *, where: str) -> float:
    """The largest difference, relative to the tensor's largest value; ContractError if it exceeds the tolerance."""
    if set(expected) != set(actual):
        raise ContractError(f"{where} computes {sorted(actual)}, expected {sorted(expected)}")
    largest = 0.0
    for name, value in expected.items():
        tolerance = RELATIVE_TOLERANCE[value.dtype]
        scale = max(value.float().abs().max().item(), 1e-6)
        difference = (value.float() - actual[name].float()).abs().max().item() / scale
        if not difference <= tolerance:  # NaN fails too
            raise ContractError(
                f"{where}: {name} differs by {difference:.2e} of its largest value, more than the tolerance {tolerance}"
            )
        largest = max(largest, difference)
    return largest


def verify_directory(model: nn.Module, directory: Path) -> float:
    """Reload a tower directory; compare every weight (bit by bit) and every feature with ``model``'s.

    Returns the largest relative difference of a feature; raises ContractError if a tensor or feature differs.
    """
    tower = tower_in(model)
    is_dual = isinstance(model, DualEncoder)
    reloaded = load_dual(directory, dtype=tower.dtype)[0] if is_dual else load_tower(directory, dtype=tower.dtype)
    reloaded = reloaded.to(tower.device).eval()
    before, after = model.state_dict(), reloaded.state_dict()
    unequal = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    if unequal := sorted(unequal | (after.keys() - before.keys())):
        raise ContractError(f"{directory}: tensors differ after reloading: {unequal}")
    return compare_features(probe_features(model), probe_features(reloaded), where=str(directory))
