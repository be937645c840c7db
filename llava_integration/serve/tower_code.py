"""The code of towers that transformers does not have, saved with a model: ``trust_remote_code`` runs it anywhere.

Where this package is installed, ``register`` is enough, and no code of the model's is run.
"""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.vision.positions import check_pixels

MODELING = "modeling_llava_tower"
# what the package shares between towers becomes part of the file
SHARED = {"from llm2clip_plugin.vision.positions import check_pixels\n": inspect.getsource(check_pixels)}
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


CODE = {
    "eva02": TowerCode(module="llm2clip_plugin.vision.eva02", config="Eva02Config", model="Eva02VisionModel"),
}
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForPreTraining")


def register() -> None:
    """Let transformers' LlavaForConditionalGeneration open the towers of this package."""
    from transformers import AutoConfig, AutoModel

    for code in CODE.values():
        module: Any = importlib.import_module(code.module)
        config = getattr(module, code.config)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(module, code.model), exist_ok=True)


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
