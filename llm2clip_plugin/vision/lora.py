"""LoRA on a tower (PEFT): low-rank updates of the blocks' Linears train, the tower's own weights are frozen.

Merged into the weights on export, so a tower directory never needs PEFT.
"""

import copy

from torch import nn

from llm2clip_plugin.vision.family import Tower
from llm2clip_plugin.vision.towers import tower_blocks


def has_lora(model: nn.Module) -> bool:
    """Whether a model carries LoRA layers; doesn't need PEFT."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def add_lora(tower: Tower, *, rank: int, alpha: int, dropout: float = 0.0) -> None:
    """Add LoRA layers to every Linear of the tower's blocks, in place; the tower's own weights are frozen.

    The update of a weight is ``alpha / rank * B @ A``; B starts at zero, so the outputs don't change at first.
    Raises ValueError for a rank below 1, a tower that already has LoRA layers, or if PEFT is not installed.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} must be at least 1")
    if has_lora(tower):
        raise ValueError("the tower already has LoRA layers")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("LoRA on the tower requires PEFT: pip install peft") from error
    blocks = {id(module) for module in tower_blocks(tower).modules()}
    linears = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear) and id(module) in blocks]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linears, bias="none")
    inject_adapter_in_model(config, tower)
    tower.train(tower.training)  # PEFT creates its layers in training mode


def merged(model: nn.Module) -> nn.Module:
    """A copy with all LoRA updates merged into the weights; the model itself if it has none."""
    if not has_lora(model):
        return model
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model
