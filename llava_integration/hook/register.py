"""What is added to three of LLaVA's modules, each right after it has run (``boot`` calls ``complete``)."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llava_integration.towers import names, provenance
from llm2clip_plugin.contracts import ContractError

OWN_OPTIONS = ("s2", "s2_scales", "unfreeze_mm_vision_tower")  # LLaVA reads them, its argument parser lacks them


def complete(module: ModuleType) -> None:
    """Wrap the function of ``module`` that has to know our towers, also where other modules bound it already."""
    if module.__name__ == "llava.model.llava_arch":
        owner, name, wrap = module.LlavaMetaModel, "initialize_vision_modules", recording
    elif module.__name__ == "llava.model.builder":
        owner, name, wrap = module, "load_pretrained_model", remembering_checkpoint
    else:
        owner, name, wrap = module, "build_vision_tower", knowing_our_names
    original = getattr(owner, name)
    if original.__module__ == __name__:
        return
    wrapper = wrap(original)
    functools.update_wrapper(wrapper, original, assigned=("__name__", "__qualname__", "__doc__"))
    setattr(owner, name, wrapper)
    for loaded_name, loaded in list(sys.modules.items()):
        if loaded_name.split(".")[0] == "llava" and getattr(loaded, name, None) is original:
            setattr(loaded, name, wrapper)


def knowing_our_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """LLaVA's ``build_vision_tower`` that answers for our names and leaves every other to ``original``."""

    def build_vision_tower(vision_tower_cfg: Any, **options: Any) -> Any:
        name: Any = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if not names.is_ours(name):
            return original(vision_tower_cfg, **options)
        return build(name, vision_tower_cfg, **options)

    return build_vision_tower


def build(name: str, config: Any, delay_load: bool = False) -> Any:
    """The tower that ``name`` means for a model with ``config`` (LLaVA's configuration or model arguments)."""
    from llava_integration.towers.multiscale import MultiscaleVisionTower
    from llava_integration.towers.tower import LLM2CLIPVisionTower

    settings_from_environment(config)
    place = provenance.find(name, config)
    kind = MultiscaleVisionTower if getattr(config, "s2", False) else LLM2CLIPVisionTower
    tower = kind(name, place, config, delay_load=True)
    provenance.check_width(name, tower.hidden_size, config)
    if not delay_load:
        tower.load_model()
    return tower


def settings_from_environment(config: Any) -> None:
    """Options that LLaVA's argument parser lacks, for a tower that is being made (a checkpoint has its own).

    ``LLM2CLIP_S2_SCALES=336,672`` and ``LLM2CLIP_UNFREEZE_TOWER=1``; both end up in the checkpoint's config.json.
    """
    if hasattr(config, "mm_vision_tower"):
        return
    if scales := os.environ.get("LLM2CLIP_S2_SCALES"):
        config.s2, config.s2_scales = True, scales
    # Pretrain trains the projector alone and saves nothing else, so there is no trained tower to come back.
    if os.environ.get("LLM2CLIP_UNFREEZE_TOWER") == "1" and not getattr(config, "tune_mm_mlp_adapter", False):
        config.unfreeze_mm_vision_tower = True


def recording(original: Callable[..., Any]) -> Callable[..., Any]:
    """LLaVA's ``initialize_vision_modules`` that writes into the configuration which tower the model now has."""

    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        before = self.get_vision_tower()
        refuse_another_name(before, model_args.vision_tower)
        if not names.is_ours(model_args.vision_tower):
            return original(self, model_args, fsdp=fsdp)
        for option in OWN_OPTIONS:  # from the base model's config.json
            if before is None and hasattr(self.config, option):
                setattr(model_args, option, getattr(self.config, option))
        original(self, model_args, fsdp=fsdp)
        tower = self.get_vision_tower()
        record = provenance.record_of(tower.place, model_args.vision_tower, tower.hidden_size)
        setattr(self.config, provenance.KEY, record)
        for option in OWN_OPTIONS:
            if hasattr(model_args, option):
                setattr(self.config, option, getattr(model_args, option))

    return initialize_vision_modules


def refuse_another_name(tower: Any, name: str) -> None:
    """LLaVA keeps a model's tower and writes the new name beside it; say so rather than train with the wrong one."""
    if tower is None or tower.vision_tower_name == name:
        return
    if not names.is_ours(name) and not names.is_ours(tower.vision_tower_name):
        return
    if names.is_ours(name) and names.is_ours(tower.vision_tower_name):
        if names.locate(name).card.weights_sha256 == tower.place.card.weights_sha256:
            return
    raise ContractError(
        f"the model already has the vision tower {tower.vision_tower_name!r}, and LLaVA would train with that one "
        f"although --vision_tower says {name!r}; name the same tower, or start from a language model without "
        "mm_vision_tower in its config.json"
    )


def remembering_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """LLaVA's ``load_pretrained_model`` that lets the tower know the checkpoint's folder."""

    def load_pretrained_model(model_path: str, *arguments: Any, **options: Any) -> Any:
        with provenance.loading(model_path):
            return original(model_path, *arguments, **options)

    return load_pretrained_model
