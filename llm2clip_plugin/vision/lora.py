"""LoRA on a tower (PEFT): low-rank updates of the Linears of its blocks train, its own weights are
frozen."""

import copy

from torch import nn

from llm2clip_plugin.vision.families import Tower
from llm2clip_plugin.vision.parts import tower_blocks


def add_lora(tower: Tower, *, rank: int, alpha: int) -> None:
    """Add LoRA layers to every Linear of the tower's blocks, in place; the tower's own weights are
    frozen.

    The update of a weight is ``alpha / rank * B @ A``; B starts at zero. Raises ValueError if PEFT
    is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("LoRA on the tower requires PEFT: pip install peft") from error
    in_blocks = {id(module) for module in tower_blocks(tower).modules()}
    linears: list[str] = []
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear) and id(module) in in_blocks:
            linears.append(name)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears, bias="none")
    inject_adapter_in_model(config, tower)
    tower.train(tower.training)  # PEFT creates its layers in training mode


def merged(model: nn.Module) -> nn.Module:
    """A copy with all LoRA updates merged into the weights; the model itself if it has none."""
    if not any(".lora_A." in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    layers: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layers[name] = module
    for name, layer in layers.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model
