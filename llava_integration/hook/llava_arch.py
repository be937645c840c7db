"""``llava.model.llava_arch``: ``initialize_vision_modules`` records the tower in the model's configuration."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from llava_integration.hook.wrapping import wrap_function
from llava_integration.towers import names
from llava_integration.towers.provenance import KEY, tower_record
from llm2clip_plugin.contracts import ContractError

OWN_OPTIONS = ("s2", "s2_scales", "unfreeze_mm_vision_tower")  # LLaVA reads them, its argument parser lacks them


def complete(module: ModuleType) -> None:
    """Wrap ``LlavaMetaModel.initialize_vision_modules``."""
    wrap_function(module.LlavaMetaModel, "initialize_vision_modules", recording)


def recording(original: Callable[..., Any]) -> Callable[..., Any]:
    """``initialize_vision_modules`` that writes the tower's record and OWN_OPTIONS into the configuration."""

    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        previous_tower = self.get_vision_tower()
        refuse_another_tower(previous_tower, model_args.vision_tower)
        if not names.is_ours(model_args.vision_tower):
            return original(self, model_args, fsdp=fsdp)
        for option in OWN_OPTIONS:  # from the base model's config.json
            if previous_tower is None and hasattr(self.config, option):
                setattr(model_args, option, getattr(self.config, option))
        original(self, model_args, fsdp=fsdp)
        tower = self.get_vision_tower()
        setattr(self.config, KEY, tower_record(tower.location, model_args.vision_tower, tower.hidden_size))
        for option in OWN_OPTIONS:
            if hasattr(model_args, option):
                setattr(self.config, option, getattr(model_args, option))

    return initialize_vision_modules


def refuse_another_tower(tower: Any, name: str) -> None:
    """Raise ContractError if the model already has a tower other than ``name``.

    LLaVA would train with the old tower and write the new name into the checkpoint.
    """
    if tower is None or tower.vision_tower_name == name:
        return
    if not names.is_ours(name) and not names.is_ours(tower.vision_tower_name):
        return
    if names.is_ours(name) and names.is_ours(tower.vision_tower_name):
        if names.locate(name).sha256 == tower.location.sha256:
            return
    raise ContractError(
        f"the model already has the vision tower {tower.vision_tower_name!r}, which LLaVA would train with despite "
        f"--vision_tower {name}; pass the same tower, or start from a language model without mm_vision_tower in its "
        "config.json"
    )
