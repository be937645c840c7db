"""The parts of an exported model: language model and projector, vision tower, and the code of towers that are ours."""

import importlib
import inspect
import operator
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_integration.checkpoints import blocks_below, check_feature
from llava_integration.serve.checkpoint import FIX, LazyTensor, LazyTensors, LlavaCheckpoint, open_file, refuse_rest
from llava_integration.towers import TowerLocation, is_ours, loading, locate_tower
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError, errors_about
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, fetch_directory
from llm2clip_plugin.vision.families import families, family_named, family_of_type, read_config
from llm2clip_plugin.vision.family import Family, remove_tokens
from llm2clip_plugin.vision.positions import check_pixels
from llm2clip_plugin.vision.publish import published

# The language model and the projector: settings and tensors, from LLaVA's names to Hugging Face's

# fields of a Llama's config.json, of transformers 4 and 5; the others are LLaVA's or of a file
FIELDS = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id
    tie_word_embeddings rope_theta rope_scaling rope_parameters attention_bias attention_dropout mlp_bias""".split()
PROJECTOR = {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}
TOWER = "model.vision_tower."
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # computed; old versions saved it
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# there is no Llama without
LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
BLOCK = """self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj
    input_layernorm post_attention_layernorm""".split()


def text_config(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """``text_config`` of the exported model: a Llama of ``tokens`` tokens."""
    text = {name: config[name] for name in FIELDS if config.get(name) is not None}
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))  # transformers 4's name
    return {**text, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokens}


def check_settings(config: dict[str, Any]) -> None:
    """Raise ContractError for settings without which there is no Llama."""
    for name in LANGUAGE_SIZES:
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ContractError(f"config.json: {name} is {value!r}, expected a positive whole number; {FIX}")


def hf_name(name: str) -> str:
    """The name in a file of transformers' LLaVA, which servers know, of a tensor of LLaVA's.

    >>> hf_name("model.mm_projector.2.bias"), hf_name("lm_head.weight")
    ('multi_modal_projector.linear_2.bias', 'language_model.lm_head.weight')
    """
    for ours, theirs in PROJECTOR.items():
        if name.startswith(f"model.{ours}."):
            return name.replace(f"model.{ours}", theirs)
    return f"language_model.{name}"


def expected(config: dict[str, Any]) -> list[str]:
    """The weights that every checkpoint of this configuration has, under LLaVA's names."""
    head = [] if config.get("tie_word_embeddings") else [HEAD]
    blocks = [f"model.layers.{n}.{part}.weight" for n in range(config["num_hidden_layers"]) for part in BLOCK]
    projector = [f"model.{layer}.{kind}" for layer in PROJECTOR for kind in ("weight", "bias")]
    return [EMBEDDING, *blocks, "model.norm.weight", *head, *projector]


def language_tensors(tensors: LazyTensors, config: dict[str, Any], tokens: int, where: Path) -> LazyTensors:
    """The language model's and the projector's tensors under Hugging Face's names, with a row for ``<image>``.

    ``tokens``: rows of the embedding that LLaVA uses. Raises ContractError for tensors that are missing or unknown, or
    an embedding with fewer rows.
    """
    own = {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name) and not name.startswith(TOWER)}
    wanted = expected(config)
    if missing := [name for name in wanted if name not in own]:
        raise ContractError(
            f"{where}: {len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}; {FIX}"
        )
    biases = {f"{name.removesuffix('.weight')}.bias" for name in wanted if ".layers." in name and "norm" not in name}
    refuse_rest(set(own) - set(wanted) - {HEAD} - biases, where)
    for name in {EMBEDDING, HEAD} & set(own):
        if own[name].shape[0] < tokens:
            raise ContractError(f"{where}: {name} has {own[name].shape[0]} rows, the tokenizer {tokens} tokens; {FIX}")
    out = {}
    for name in sorted(own, key=_order):
        if name == HEAD and config.get("tie_word_embeddings"):
            continue
        out[hf_name(name)] = with_image_row(own[name], tokens) if name in (EMBEDDING, HEAD) else own[name]
    return out


def _order(name: str) -> list[tuple[int, str]]:
    """Layer 2 precedes layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def with_image_row(rows: LazyTensor, tokens: int) -> LazyTensor:
    """The first ``tokens`` rows and one for ``<image>``: their mean.

    In the embedding it is replaced by the image. In the head it makes the token's logit the mean of all logits, which
    is never the largest: the model answers as without it.
    """

    def read() -> Tensor:
        kept = rows.read()[:tokens]
        return torch.cat((kept, kept.float().mean(0, keepdim=True).to(kept.dtype)))

    return LazyTensor(shape=(tokens + 1, rows.shape[1]), read=read, where=rows.where)


# The code of towers that transformers does not have, saved with a model: ``trust_remote_code`` runs it anywhere. Where
# this package is installed, ``register`` is enough, and no code of the model's is run.

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


VISION_SIZES = (
    "hidden_size",
    "image_size",
    "patch_size",
    "num_hidden_layers",
)  # kept where they equal a class's defaults
MORE_SIZES = ("num_attention_heads", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class ExportedTower:
    """A tower directory, or for a stock checkpoint the Hugging Face directory that it names."""

    directory: Path
    family: Family
    config: dict[str, Any]  # ``vision_config``
    location: TowerLocation | None  # None: not a tower of this package

    @property
    def patches(self) -> int:
        """Patches of an image, without the class token."""
        return (self.config["image_size"] // self.config["patch_size"]) ** 2

    @property
    def card(self) -> TowerCard | None:
        """The tower's card without paths of this machine."""
        return published(self.location.card) if self.location else None


def find(checkpoint: LlavaCheckpoint, tower: str = "") -> ExportedTower:
    """The tower that loading the checkpoint finds, or ``tower`` (path, registered name or Hub id).

    Raises FileNotFoundError or ContractError without that tower, or if its files are damaged.
    """
    name = str(checkpoint.config["mm_vision_tower"])
    location = None
    if is_ours(name) or tower:
        with loading(str(checkpoint.directory)):
            location = locate_tower(checkpoint.directory, name, checkpoint.config, tower)
        location.check_weights()
        directory = location.directory
    else:
        directory = fetch_directory(name)
    family, config = read_config(directory)
    fields = vision_config(family, config, where=directory)
    sizes = {name: getattr(config, name) for name in VISION_SIZES}
    sizes |= {name: getattr(config, name) for name in MORE_SIZES if hasattr(config, name)}
    dropped = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures"}
    fields = {key: value for key, value in fields.items() if key not in dropped}
    layer: Any = checkpoint.config.get("mm_vision_select_layer")
    with errors_about(f"{checkpoint.directory}: mm_vision_select_layer {layer!r}", fix=FIX):
        blocks_below(operator.index(layer), sizes["num_hidden_layers"])
    with errors_about(checkpoint.directory, fix=FIX):
        check_feature(checkpoint.config.get("mm_vision_select_feature", "patch"))
    width = checkpoint.config.get("mm_hidden_size")
    if width != sizes["hidden_size"]:
        raise ContractError(
            f"the projector of {checkpoint.directory} expects features of width {width}, but the tower in {directory} "
            f"has hidden_size {sizes['hidden_size']}; pass the tower that it was trained with as --tower"
        )
    return ExportedTower(directory=directory, family=family, config={**fields, **sizes}, location=location)


def tower_tensors(tower: ExportedTower, trained: LazyTensors, *, unfrozen: bool, files: ExitStack) -> LazyTensors:
    """The tower's tensors under Hugging Face's names.

    Those of the tower's directory, as LLaVA reads them; ``unfrozen``: those that LLaVA has trained take their place,
    ``trained`` being the tensors of its checkpoint. Blocks that LLaVA never runs are in the directory alone.
    """
    from llm2clip_plugin.vision.checkpoint import weight_files

    prefix, own = tower.family.file_prefix, {}
    for path in [tower.directory / WEIGHTS_FILE] if tower.location else weight_files(tower.directory):
        own |= open_file(path, files)
    own = {name: tensor for name, tensor in own.items() if not name.startswith(tower.family.not_tower or ("\0",))}
    own = {name: tensor for name, tensor in own.items() if not name.endswith("position_ids")}
    if unfrozen:
        inside = f"{TOWER}vision_tower."
        new = {name.removeprefix(inside): tensor for name, tensor in trained.items() if name.startswith(inside)}
        new = {prefix + name.removeprefix(prefix): tensor for name, tensor in new.items()}
        if not new:
            raise ContractError(f"unfreeze_mm_vision_tower is set, but the checkpoint has no tensors {inside}*; {FIX}")
        refuse_rest(set(new) - set(own), tower.directory)
        own |= new
    return {f"vision_tower.{name}": tensor for name, tensor in own.items()}


def image_processor(tower: ExportedTower, *, pads: bool) -> dict[str, Any]:
    """preprocessor_config.json: the tower's own; ``pads``: images are padded to squares, as LLaVA trained."""
    own = preprocessor_config(tower.directory)
    if not pads:
        return {**own, "processor_class": "LlavaProcessor"}
    return {**own, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "processor_class": "LlavaProcessor"}


def strategy(tower: ExportedTower, config: dict[str, Any]) -> dict[str, Any]:
    """Which tokens of the tower become image tokens: the settings of the model and of its processor."""
    drops_class = tower.family.has_cls and config.get("mm_vision_select_feature", "patch") == "patch"
    return {
        "vision_feature_select_strategy": "default" if drops_class else "full",
        "num_additional_image_tokens": int(tower.family.has_cls),
        "image_seq_length": tower.patches + int(tower.family.has_cls and not drops_class),
    }
