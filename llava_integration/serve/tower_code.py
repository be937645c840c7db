"""The code of towers that transformers does not have, saved with a model: ``trust_remote_code`` runs it anywhere.

Where this package is installed, ``register`` is enough, and no code of the model's is run.
"""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.families import families, family_named, family_of_type
from llm2clip_plugin.vision.family import Family, remove_tokens
from llm2clip_plugin.vision.positions import check_pixels

MODELING = "modeling_llava_tower"
# what the package shares between towers becomes part of the file
SHARED = {
    f"from {function.__module__} import {function.__name__}\n": inspect.getsource(function)
    for function in (check_pixels, remove_tokens)
}
LLAVA = '''\
"""LLaVA with the vision tower of {file}.py."""

import transformers
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from .{file} import {config}, {model}

AutoConfig.register({config}.model_type, {config}, exist_ok=True)
AutoModel.register({config}, {model}, exist_ok=True)

# of the tensors in files to those in memory; transformers 5 applies its own to its own classes alone
RENAMED = {{
    "^language_model.lm_head": "lm_head",
    "^language_model.model": "model.language_model",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
}}


class LlavaTowerConfig(LlavaConfig):
    """As transformers' own, once the tower is registered."""


class LlavaTowerForConditionalGeneration(LlavaForConditionalGeneration):
    """As transformers' own, once the tower is registered."""

    config_class = LlavaTowerConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if int(transformers.__version__.split(".")[0]) >= 5:
            kwargs.setdefault("key_mapping", RENAMED)
        return super().from_pretrained(*args, **kwargs)
'''


@dataclass(frozen=True, kw_only=True)
class TowerCode:
    """A module of this package that stands alone, but for SHARED."""

    module: str
    config: str  # names of its classes
    model: str


STANDALONE = "llm2clip_plugin.vision.standalone"
CODE = {  # by family
    "eva02": TowerCode(module="llm2clip_plugin.vision.eva02", config="Eva02Config", model="Eva02VisionModel"),
    "openvision": TowerCode(module=f"{STANDALONE}.openvision", config="OpenVisionConfig", model="OpenVisionModel"),
    "timm": TowerCode(module=f"{STANDALONE}.timm_vit", config="TimmVitConfig", model="TimmVit"),
    # transformers' own give registers to LLaVA, too, which takes them for patches
    "dinov3": TowerCode(module=f"{STANDALONE}.dinov3", config="Dinov3TowerConfig", model="Dinov3Tower"),
    "radio": TowerCode(module=f"{STANDALONE}.radio", config="RadioTowerConfig", model="RadioTower"),
}
TYPES = {f"llm2clip_{family}": family for family in CODE}  # ``model_type`` in vision_config
# towers that AutoModel does not open, but which are another's architecture: family -> its model_type
SAME_AS = {"metaclip2": "clip_vision_model"}
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForPreTraining")


def register() -> None:
    """Let transformers' LlavaForConditionalGeneration open the towers of this package, as far as libraries allow."""
    from transformers import AutoConfig, AutoModel

    for family, code in CODE.items():
        try:
            own = families()[family].vision_class()
            module: Any = importlib.import_module(code.module)
        except ValueError:  # of newer libraries
            continue
        if TYPES.get(own.config_class.model_type) != family:  # DINOv3's is that of tower directories
            own = getattr(module, code.model)
        AutoConfig.register(own.config_class.model_type, own.config_class, exist_ok=True)
        AutoModel.register(own.config_class, own, exist_ok=True)


def vision_config(family: Family, config: Any, *, where: object) -> dict[str, Any]:
    """A tower's configuration as ``vision_config`` of a LLaVA that transformers, or the code in its folder, opens.

    Raises ContractError for families without either.
    """
    from transformers import AutoModel

    if family.name in SAME_AS:
        return {**config.to_dict(), "model_type": SAME_AS[family.name]}
    if family.name in CODE:
        return {**config.to_diff_dict(), "model_type": f"llm2clip_{family.name}"}
    if type(config) not in AutoModel._model_mapping:  # as AutoModel.from_config asks
        raise ContractError(
            f"{where}: towers of the family {family.name!r} cannot be exported: transformers' LLaVA does not open "
            f"model_type {config.model_type!r}, and no code is known to save with the model ({', '.join(CODE)})"
        )
    return {**config.to_diff_dict(), "model_type": config.model_type}


def family_of_vision(config: dict[str, Any], *, where: str) -> Family:
    """The family of an exported ``vision_config``. Raises ValueError for an unknown model_type."""
    kind = str(config.get("model_type", "clip_vision_model"))
    return family_named(TYPES[kind]) if kind in TYPES else family_of_type(kind, where=where)


def of_tower_directories(vision: dict[str, Any], family: Family) -> dict[str, Any]:
    """``vision_config`` under the ``model_type`` that the family's tower directories have."""
    if vision.get("model_type") in family.model_types:
        return vision
    return {**vision, "model_type": family.model_types[0]}


def write_code(family: str, directory: Path) -> dict[str, str]:
    """Write a family's code into a model's folder; ``auto_map`` of its config.json, {} if transformers has it."""
    code = CODE.get(family)
    if code is None:
        return {}
    file = code.module.rpartition(".")[2]
    source = inspect.getsource(importlib.import_module(code.module))
    for line, text in SHARED.items():
        source = source.replace(line, f"\n\n{text}\n\n" if line in source else line)
    assert "llm2clip_plugin" not in source.replace('"""', ""), f"{code.module} is to stand alone"
    (directory / f"{file}.py").write_text(source, encoding="utf-8")
    modeling = LLAVA.format(file=file, config=code.config, model=code.model)
    (directory / f"{MODELING}.py").write_text(modeling, encoding="utf-8")
    model = f"{MODELING}.LlavaTowerForConditionalGeneration"
    return {"AutoConfig": f"{MODELING}.LlavaTowerConfig", **dict.fromkeys(AUTO_CLASSES, model)}
