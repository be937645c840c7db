"""Wrappers of LLaVA's functions, so that LLaVA builds, records and finds the towers of this
package.

``boot`` calls `complete` for each module that `boot.knows_towers` names, right after Python has
executed it.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_integration.plug import towers
from llava_integration.plug.checkpoints import CONFIG, config_of, refuse_name
from llava_integration.plug.quantized import quantized_as_base, refuse_quantized_base
from llava_integration.plug.resumed_data import refuse_other_base
from llm2clip_plugin.errors import ContractError, errors_about

# LLaVA reads them, but its argument parser does not define them
OWN_OPTIONS = ("s2", "s2_scales", "unfreeze_mm_vision_tower")
# in config.json: --version, which LLaVA does not record
CONVERSATION = "llm2clip_conversation"
FIRST_LAYER = re.compile(r"mm_projector\.(0\.)?weight$")
Function = Callable[..., Any]


def complete(module: ModuleType) -> None:
    """Wrap the function of ``module`` that handles vision towers; complete LLaVA's trainer."""
    name = module.__name__  # one that boot.knows_towers names
    if name.endswith(".llava_trainer"):
        from llava_integration.plug import training

        training.complete_trainer(module)
    elif name.endswith("multimodal_encoder.builder"):
        wrap_function(module, "build_vision_tower", build_vision_tower)
    elif name.endswith(".builder"):
        wrap_function(module, "load_pretrained_model", load_pretrained_model)
    else:
        for value in list(vars(module).values()):
            if isinstance(value, type) and "initialize_vision_modules" in vars(value):
                wrap_function(
                    value, "initialize_vision_modules", initialize_vision_modules
                )


def wrap_function(owner: Any, name: str, function: Function) -> None:
    """Set ``name`` of ``owner``, a module or class, to ``function``, whose first argument is the
    original; also in loaded modules of its package that imported the original. A second call does
    nothing."""
    original = getattr(owner, name)
    if original.__module__ == __name__:
        return

    def wrapper(*arguments: Any, **options: Any) -> Any:
        return function(original, *arguments, **options)

    functools.update_wrapper(
        wrapper, original, assigned=("__name__", "__qualname__", "__doc__")
    )
    setattr(owner, name, wrapper)
    package = original.__module__.split(".")[0]
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != package:
            continue
        if getattr(module, name, None) is original:
            setattr(module, name, wrapper)


def build_vision_tower(
    original: Function, vision_tower_cfg: Any, *arguments: Any, **options: Any
) -> Any:
    """The tower of this package that a configuration, or LLaVA's arguments, name; others are left
    to ``original``."""
    from llava_integration.plug.tower import LLM2CLIPVisionTower, MultiscaleVisionTower

    name: Any = getattr(vision_tower_cfg, "vision_tower", None)  # of arguments
    name = getattr(vision_tower_cfg, "mm_vision_tower", name)
    if not towers.is_ours(name):
        return original(vision_tower_cfg, *arguments, **options)
    settings_from_environment(vision_tower_cfg)
    location = towers.find_tower(name, vision_tower_cfg)
    tower_class = LLM2CLIPVisionTower
    if getattr(vision_tower_cfg, "s2", False):
        tower_class = MultiscaleVisionTower
    tower = tower_class(name, location, vision_tower_cfg, delay_load=True)
    check_projector(name, tower.hidden_size, vision_tower_cfg)
    if projector := getattr(vision_tower_cfg, "pretrain_mm_mlp_adapter", None):
        refuse_others_projector(projector, name, location.sha256)
        note_unrecorded(projector)
    if not options.get("delay_load"):
        tower.load_model()
    return tower


def check_projector(name: str, hidden_size: int, config: Any) -> None:
    """Raise ContractError, with both widths, for a projector trained for another width; LLaVA's own
    error is bare. The width is ``mm_hidden_size``, and that of the weights in
    ``pretrain_mm_mlp_adapter``."""
    import torch

    expected = {}
    if trained := getattr(config, "mm_hidden_size", None):
        expected[towers.checkpoint_of(config) or "the checkpoint"] = trained
    if adapter := getattr(config, "pretrain_mm_mlp_adapter", None):
        with errors_about(
            adapter, fix="pretrain the projector again, or copy it again"
        ):
            weights = torch.load(adapter, map_location="cpu", weights_only=True)
        for key, tensor in weights.items():
            # others have no width to compare
            if FIRST_LAYER.search(key) and tensor.ndim == 2:
                expected[adapter] = tensor.shape[1]
    for where, width in expected.items():
        if width != hidden_size:
            problem = f"the projector of {where} expects features of width {width}"
            advice = "use the tower that it was trained with, or pretrain a projector for this one"
            raise ContractError(
                f"{problem}, but the tower {name!r} has hidden_size {hidden_size}; {advice}"
            )


def refuse_others_projector(projector: str, name: str, sha256: str) -> None:
    """Raise ContractError for a projector that was pretrained with another tower, by the
    config.json that LLaVA writes next to it. ``sha256``: of the tower ``name``, "" for one of
    LLaVA's own."""
    config = config_of(Path(projector).parent)
    before = config.get("mm_vision_tower")
    recorded = (config.get(towers.KEY) or {}).get("weights_sha256")
    is_another = recorded != sha256
    if not recorded:  # nothing is known of a tower of ours, or of two of LLaVA's names
        is_another = bool(before and sha256 and not towers.is_ours(before))
    if not is_another:
        return
    was = f"{before!r}" + (f", sha256 {recorded}" if recorded else "")
    now = f"{name!r}" + (f", sha256 {sha256}" if sha256 else "")
    raise ContractError(
        f"{projector} was pretrained with the vision tower {was}, not with {now}; use that tower, "
        "or pretrain a projector for this one. To start from it nevertheless, copy it to a folder "
        f"without {CONFIG}"
    )


def note_unrecorded(projector: str) -> None:
    """Say of a projector that nothing next to it names its tower: one of another tower of the same
    width would fit, and be wrong."""
    config = config_of(Path(projector).parent)
    before = config.get("mm_vision_tower")
    is_known = towers.KEY in config or bool(before and not towers.is_ours(before))
    if not is_known and os.environ.get("RANK", "0") == "0":
        print(
            f"note: no {CONFIG} next to {projector} records the vision tower that it was "
            "pretrained with; it was not compared with --vision_tower"
        )


def settings_from_environment(config: Any) -> None:
    """Set OWN_OPTIONS from the environment for a new model; a checkpoint's config.json has them.
    ``LLM2CLIP_S2_SCALES=336,672`` and ``LLM2CLIP_UNFREEZE_TOWER=1``; both are saved to the
    checkpoint's config.json."""
    if hasattr(config, "mm_vision_tower"):
        return
    if scales := os.environ.get("LLM2CLIP_S2_SCALES"):
        config.s2 = True
        config.s2_scales = scales
    if unfreezes(config):
        config.unfreeze_mm_vision_tower = True


def unfreezes(config: Any) -> bool:
    """Whether ``LLM2CLIP_UNFREEZE_TOWER`` is 1; never in pretraining, which saves the projector
    alone."""
    return os.environ.get("LLM2CLIP_UNFREEZE_TOWER") == "1" and not getattr(
        config, "tune_mm_mlp_adapter", False
    )


def initialize_vision_modules(
    original: Function, self: Any, model_args: Any, *arguments: Any, **options: Any
) -> None:
    """Write the tower's record and OWN_OPTIONS into the model's configuration."""
    # a fork may have towers of other names alone
    name: Any = getattr(model_args, "vision_tower", None)
    previous_tower = (
        self.get_vision_tower() if hasattr(self, "get_vision_tower") else None
    )
    refuse_another_tower(previous_tower, name)
    if not towers.is_ours(name):
        return original(self, model_args, *arguments, **options)
    # LLaVA writes the name to config.json. Without this package it would open a bare path as a
    # CLIP, whatever is in it, with random weights; a name with the prefix it does not know.
    name = model_args.vision_tower = towers.prefixed(name)
    for option in OWN_OPTIONS:  # from the base model's config.json
        if previous_tower is None and hasattr(self.config, option):
            setattr(model_args, option, getattr(self.config, option))
    # that of a LLaVA which is trained further
    if previous_tower is not None and unfreezes(model_args):
        previous_tower.unfrozen = model_args.unfreeze_mm_vision_tower = True
        previous_tower.requires_grad_()
    original(self, model_args, *arguments, **options)
    tower = self.get_vision_tower()
    record = towers.tower_record(tower.location, name, tower.hidden_size)
    setattr(self.config, towers.KEY, record)
    for option in OWN_OPTIONS:
        if hasattr(model_args, option):
            setattr(self.config, option, getattr(model_args, option))
    if version := getattr(model_args, "version", ""):
        setattr(self.config, CONVERSATION, version)


def refuse_another_tower(tower: Any, name: Any) -> None:
    """Raise ContractError if the model has another tower, with which LLaVA would train, and write
    the new name."""
    previous = getattr(tower, "vision_tower_name", None)
    if tower is None or previous == name:
        return
    was_ours = towers.is_ours(previous)
    becomes_ours = towers.is_ours(name)
    if not was_ours and not becomes_ours:
        return
    if was_ours and becomes_ours:
        if towers.locate(name).sha256 == tower.location.sha256:
            return
    raise ContractError(
        f"the model already has the vision tower {previous!r}, "
        f"which LLaVA would use despite --vision_tower {name}; "
        "pass that tower, or start from a language model without mm_vision_tower"
    )


def load_pretrained_model(
    original: Function, model_path: str, *arguments: Any, **options: Any
) -> Any:
    """Refuse a name by which LLaVA would load another kind of model, and make the checkpoint's path
    known to ``towers`` during loading, for the tower bundled in the checkpoint."""
    names = ("model_base", "model_name", "load_8bit", "load_4bit")
    given = dict(zip(names, arguments, strict=False)) | options
    base = given.get("model_base")
    config = config_of(model_path)
    if base:
        refuse_other_base(config, base, model_path)
    if not towers.is_ours(config.get("mm_vision_tower")):
        with towers.loading(model_path):
            return original(model_path, *arguments, **options)
    refuse_name(model_path, base=base, name=given.get("model_name"))
    refuse_quantized_base(
        model_path,
        base,
        in_8bit=bool(given.get("load_8bit")),
        in_4bit=bool(given.get("load_4bit")),
    )
    with towers.loading(model_path), quantized_as_base(original.__globals__, base):
        return original(model_path, *arguments, **options)
