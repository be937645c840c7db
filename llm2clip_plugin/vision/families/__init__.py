"""Families of vision towers, as plain data: a file defines ``FAMILY``, or a list of twins; a new
file is a family."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llm2clip_plugin.discovery import discover
from llm2clip_plugin.errors import errors_about
from llm2clip_plugin.vision.directory import CONFIG_FILE, read_json, section

# a Hugging Face vision model (nn.Module); the fields of its `config` differ by family
Tower: TypeAlias = Any

# channel means and standard deviations of pixels in [0, 1], as in pretraining
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF_MEAN = (0.5, 0.5, 0.5)
HALF_STD = (0.5, 0.5, 0.5)

# timm's and OpenCLIP's names of PIL's filters
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}

# Hugging Face's model_type -> the same models in timm, for messages
IN_TIMM = {
    "beit": "timm:beit_*",
    "deit": "timm:deit_*",
    "ijepa": "timm:vit_huge_patch14_gap_224.in1k_ijepa",
    "vit": "timm:vit_*",
}

# how the model_type begins of models that `llm2clip import` opens, as another family's
IMPORTED_FIRST = ("timm", "qwen3_", "qwen2_5_vl", "intern_vit")

# sizes that several families share, as fields of config.json
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


@dataclass(frozen=True, kw_only=True)
class TowerCode:
    """The code that an exported model carries, where transformers cannot open the tower as it is
    here: classes of a file of ``llm2clip_plugin/vision`` that stands alone."""

    file: str
    config: str
    model: str
    # transformers has the family, too; but its states contain register tokens, which LLaVA would
    # take for patches
    is_in_transformers: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of towers.

    Dotted names are relative to the module that contains the blocks: ``vision_model``, in which
    transformers 4 wraps CLIP and SigLIP, or the tower itself.
    """

    name: str  # in the TowerCard
    # `model_type` in config.json, of the vision model and of models that contain it
    model_types: tuple[str, ...]
    # returns the Hugging Face class, which is imported only then
    vision_class: Callable[[], Any]
    has_cls: bool  # a class token precedes the patches
    # the position table; "" if the family has none
    positions: str = "embeddings.position_embedding.weight"
    blocks: str = "encoder.layers"  # the ModuleList of transformer blocks
    # modules and parameters below the first block
    embeddings: tuple[str, ...] = ("embeddings",)
    final_norm: str  # the norm after the last block
    last_state_is_normed: bool = True  # last_hidden_state is the output of final_norm
    # modules that only pooler_output uses (SigLIP's attention pooling)
    pooling_head: tuple[str, ...] = ()
    # parameters that the tower's forward pass never reads
    never_trained: tuple[str, ...] = ()
    file_prefix: str = ""  # of the tower's tensors in files on the Hub
    # prefixes of the other tensors in a file, such as a text tower's
    not_tower: tuple[str, ...] = ()
    # the class of the image-text model that contains the tower
    image_text_class: Callable[[], Any] | None = None
    # tensors that every image-text model of the family has
    image_text_tensors: tuple[str, ...] = ()
    # for preprocessing, if the source doesn't specify it
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resample: int = 3  # PIL's filter, likewise; bicubic
    # where training starts if the source has no logit scale and none is set: CLIP's start, or where
    # the family's own training ended
    scale: float = 1 / 0.07
    needs: str = ""  # requirement beyond the package's own, for the model card
    # of exported models; None: transformers opens the tower
    code: TowerCode | None = None
    # model_type of the same architecture, where AutoModel does not open the family's own
    opens_as: str = ""
    # name or Hub id -> config.json, for --dry-run
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has_pooled_output(self, config: Any) -> bool:
        """Whether a tower's ``pooler_output`` is one: a SigLIP inside a vision-language model lacks
        the head that pools."""
        return self.name != "siglip" or getattr(config, "vision_use_head", True)


def in_transformers(name: str) -> Callable[[], Any]:
    """A function that imports and returns ``transformers.NAME``."""
    return in_module("transformers", name)


def in_module(module: str, name: str) -> Callable[[], Any]:
    """A function that imports ``module`` and returns ``name`` from it."""
    return lambda: getattr(importlib.import_module(module), name)


def wrapped(
    name: str,
    *,
    of: str,
    title: str,
    since: str,
    config: str = "",
    file: str = "wrapped",
) -> Callable[[], Any]:
    """A function that returns class ``name`` of ``vision/wrapped.py``, or of another ``file``
    there, as ``transformers.OF``, its base.

    It has the base's name and configuration (or the class ``config``, of the base's type), as
    transformers translates the Hub's tensor names for its own classes alone. Raises ValueError in
    versions of transformers before ``since``.
    """
    module = f"llm2clip_plugin.vision.{file}"

    @functools.lru_cache(maxsize=1)
    def made() -> type:
        transformers = importlib.import_module("transformers")
        if (base := getattr(transformers, of, None)) is None:
            raise ValueError(
                f"{title} requires transformers {since} or newer; {transformers.__version__} is "
                "installed"
            )
        model = in_module(module, name)()
        settings = base.config_class
        if config:
            settings = in_module(module, config)()
        overridden = {
            "config_class": settings,
            "is_custom_code": classmethod(lambda cls: False),
        }
        return type(of, (model,), overridden)

    return made


def families() -> dict[str, Family]:
    """Every family by name."""
    return discover(__name__, "FAMILY")


def family_of_type(
    model_type: str, *, where: str, config: Mapping[str, Any] | None = None
) -> Family:
    """The family whose config.json has this ``model_type``; for the error message, ``where`` and
    the whole ``config``."""
    family_by_type = {
        model_type: family
        for family in families().values()
        for model_type in family.model_types
    }
    if model_type in family_by_type:
        return family_by_type[model_type]
    if model_type in IN_TIMM or (config or {}).get("vision_config"):
        raise ValueError(f"{where} {no_family(model_type, config or {})}")
    raise ValueError(
        f"{where}: no tower family has model_type {model_type!r}; known: "
        f"{', '.join(sorted(family_by_type))}"
    )


def no_family(model_type: str, config: Mapping[str, Any]) -> str:
    """What a config.json describes that is no tower here, and what to take instead."""
    if timm_name := IN_TIMM.get(model_type):
        return (
            f"describes a {model_type} model, which is opened from timm alone: pass {timm_name} "
            "(`timm.list_models`) in place of the folder"
        )
    part = tower_inside(config)
    if is_known_inside(part):
        return (
            f"describes a {model_type} model, which reads images and texts; `llm2clip import "
            f"SOURCE --part vision --output DIR` takes out its tower ({part})"
        )
    vision: Any = config.get("vision_config")
    architecture = vision.get("architecture") if isinstance(vision, dict) else None
    if part == "timm_wrapper" and architecture:
        advice = f"pass timm:{architecture}, if timm lists it, for its weights before the VLM's"
    elif part in IN_TIMM:
        advice = f"pass {IN_TIMM[part]} (`timm.list_models`)"
    else:
        advice = "pass the vision model that it was trained from"
    return (
        f"describes a {model_type} model, which reads images and texts, whose tower ({part}) is of "
        f"no family here: {advice}"
    )


def tower_inside(config: Mapping[str, Any]) -> str:
    """The model_type of the vision part of a config.json; the whole model's where the part states
    none."""
    vision: Any = config.get("vision_config")
    stated = vision.get("model_type") if isinstance(vision, dict) else None
    return str(stated or config.get("model_type"))


def is_known_inside(part: str) -> bool:
    """Whether ``llm2clip import --part vision`` reads a vision part of this model_type."""
    if part.startswith(IMPORTED_FIRST):
        return part != "timm_wrapper"
    return any(part in family.model_types for family in families().values())


def family_of(tower: Tower) -> Family:
    """The family of a loaded tower."""
    return family_of_type(tower.config.model_type, where=type(tower).__name__)


def read_config(directory: Path) -> tuple[Family, Any]:
    """Family and vision configuration of a directory, an image-text model's too; ContractError if
    it is damaged."""
    file = directory / CONFIG_FILE
    body = read_json(file)
    kind = str(body.get("model_type", "timm" if "architecture" in body else None))
    fields = section(body, "vision_config") or body
    # not NaFlex
    is_fixed = (
        kind.startswith("siglip2")
        and "image_size" in fields
        and "num_patches" not in fields
    )
    if kind.startswith(IMPORTED_FIRST) or is_fixed:
        raise ValueError(
            f"{file} describes a {kind} model; run `llm2clip import {directory} --output DIR` first"
        )
    family = family_of_type(kind, where=str(file), config=body)
    vision_class = family.vision_class()  # says which transformers it needs
    with errors_about(file, fix="copy or export the tower again"):
        return family, vision_class.config_class.from_pretrained(directory)
