"""``llava.model.multimodal_encoder.builder``: ``build_vision_tower`` builds the towers of this package, too."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llava_integration.hook.wrapping import wrap_function
from llava_integration.towers import names
from llava_integration.towers.projector import check_projector
from llava_integration.towers.provenance import find_tower


def complete(module: ModuleType) -> None:
    """Wrap ``build_vision_tower``."""
    wrap_function(module, "build_vision_tower", knowing_our_names)


def knowing_our_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """``build_vision_tower`` that leaves names other than ours to ``original``."""

    def build_vision_tower(vision_tower_cfg: Any, **options: Any) -> Any:
        name: Any = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if not names.is_ours(name):
            return original(vision_tower_cfg, **options)
        return build(name, vision_tower_cfg, **options)

    return build_vision_tower


def build(name: str, config: Any, delay_load: bool = False) -> Any:
    """The tower that ``name`` means for a model with ``config`` (LLaVA's configuration or model arguments).

    Raises TowerNotFoundError, or ContractError for another tower than the one that the checkpoint was trained with.
    """
    from llava_integration.towers.multiscale import MultiscaleVisionTower
    from llava_integration.towers.tower import LLM2CLIPVisionTower

    settings_from_environment(config)
    location = find_tower(name, config)
    tower_class = MultiscaleVisionTower if getattr(config, "s2", False) else LLM2CLIPVisionTower
    tower = tower_class(name, location, config, delay_load=True)
    check_projector(name, tower.hidden_size, config)
    if not delay_load:
        tower.load_model()
    return tower


def settings_from_environment(config: Any) -> None:
    """Set the options that LLaVA's argument parser lacks, for a new model (a checkpoint's config.json has them).

    ``LLM2CLIP_S2_SCALES=336,672`` and ``LLM2CLIP_UNFREEZE_TOWER=1``; both are saved to the checkpoint's config.json.
    """
    if hasattr(config, "mm_vision_tower"):
        return
    if scales := os.environ.get("LLM2CLIP_S2_SCALES"):
        config.s2, config.s2_scales = True, scales
    # Pretraining saves the projector alone: an unfrozen tower's weights would be lost.
    if os.environ.get("LLM2CLIP_UNFREEZE_TOWER") == "1" and not getattr(config, "tune_mm_mlp_adapter", False):
        config.unfreeze_mm_vision_tower = True
