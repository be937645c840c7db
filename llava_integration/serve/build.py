"""The parts of a Hugging Face LLaVA: language model and projector, vision tower, and the code of our own towers."""

import importlib
import inspect
import operator
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_integration.checkpoints import blocks_below, check_feature
from llava_integration.serve.checkpoint import FIX, LazyTensor, LazyTensors, LlavaCheckpoint, open_file, refuse_rest
from llava_integration.towers import KEY as TOWER_KEY
from llava_integration.towers import TowerLocation, is_ours, loading, locate_tower, tower_record
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError, errors_about
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, fetch_directory, published, weight_files
from llm2clip_plugin.vision.families import Family, read_config
from llm2clip_plugin.vision.towers import preprocessor_config

# The language model and the projector: settings and tensors, from LLaVA's names to Hugging Face's

# fields of a Llama's config.json, of transformers 4 and 5; the others are LLaVA's or of a file
FIELDS = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id
    tie_word_embeddings rope_theta rope_scaling rope_parameters attention_bias attention_dropout mlp_bias""".split()
PROJECTOR = {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}
TOWER = "model.vision_tower."
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # computed; old versions saved it
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = """self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj
    input_layernorm post_attention_layernorm""".split()


def text_config(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """``text_config`` of the exported model: a Llama of ``tokens`` tokens."""
    text = {name: config[name] for name in FIELDS if config.get(name) is not None}
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))  # transformers 4's name
    return {**text, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokens}


def hf_name(name: str) -> str:
    """The name in a file of transformers' LLaVA, which servers know, of a tensor of LLaVA's.

    >>> hf_name("model.mm_projector.2.bias"), hf_name("lm_head.weight")
    ('multi_modal_projector.linear_2.bias', 'language_model.lm_head.weight')
    """
    for ours, theirs in PROJECTOR.items():
        if name.startswith(f"model.{ours}."):
            return name.replace(f"model.{ours}", theirs)
    return f"language_model.{name}"


def language_tensors(tensors: LazyTensors, config: dict[str, Any], tokens: int, where: Path) -> LazyTensors:
    """The language model's and the projector's tensors under Hugging Face's names, with a row for ``<image>``.

    ``tokens``: rows of the embedding that LLaVA uses. Raises ContractError for tensors that are missing or unknown, or
    an embedding with fewer rows.
    """
    own = {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name) and not name.startswith(TOWER)}
    is_tied = bool(config.get("tie_word_embeddings"))
    blocks = [f"model.layers.{n}.{part}.weight" for n in range(config["num_hidden_layers"]) for part in BLOCK]
    projector = [f"model.{layer}.{kind}" for layer in PROJECTOR for kind in ("weight", "bias")]
    wanted = [EMBEDDING, *blocks, "model.norm.weight", *([] if is_tied else [HEAD]), *projector]
    if missing := [name for name in wanted if name not in own]:
        told = f"{len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}"
        raise ContractError(f"{where}: {told}; {FIX}")
    biases = {f"{name.removesuffix('.weight')}.bias" for name in blocks if "norm" not in name}
    refuse_rest(set(own) - set(wanted) - {HEAD} - biases, where)
    out = {}
    for name in sorted(own, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(4), name)):
        rows = own[name]
        if name in (EMBEDDING, HEAD):
            if rows.shape[0] < tokens:
                raise ContractError(f"{where}: {name} has {rows.shape[0]} rows, the tokenizer {tokens} tokens; {FIX}")
            rows = with_image_row(rows, tokens)
        if name != HEAD or not is_tied:
            out[hf_name(name)] = rows
    return out


def with_image_row(rows: LazyTensor, tokens: int, *, added: int = 1) -> LazyTensor:
    """The first ``tokens`` rows and their mean, ``added`` times, the last for ``<image>``.

    In the embedding it is replaced by the image. In the head it makes the token's logit the mean of all logits, which
    is never the largest: the model answers as without it.
    """

    def read() -> Tensor:
        kept = rows.read()[:tokens]
        return torch.cat((kept, kept.float().mean(0, keepdim=True).to(kept.dtype).expand(added, -1)))

    return LazyTensor(shape=(tokens + added, rows.shape[1]), read=read, where=rows.where)


# The code of towers that transformers does not have, saved with a model: ``trust_remote_code`` runs it anywhere. Where
# this package is installed, ``register`` is enough, and no code of the model's is run.

VISION = "llm2clip_plugin.vision"
MODELING = "modeling_llava_tower"
LLAVA = '''\
"""{arch} with the vision tower of {file}.py."""

import transformers
from transformers import AutoConfig, AutoModel, {arch}Config, {arch}ForConditionalGeneration

from .{file} import {config}, {model}

AutoConfig.register({config}.model_type, {config}, exist_ok=True)
AutoModel.register({config}, {model}, exist_ok=True)

# of the tensors in files to those in memory; transformers 5 applies its own to its own classes alone
RENAMED = {{
    "^language_model.lm_head": "lm_head",
    "^language_model.model": "model.language_model",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
    "^image_newline": "model.image_newline",
}}


class {arch}TowerConfig({arch}Config):
    """As transformers' own, once the tower is registered."""


class {arch}TowerForConditionalGeneration({arch}ForConditionalGeneration):
    """As transformers' own, once the tower is registered."""

    config_class = {arch}TowerConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if int(transformers.__version__.split(".")[0]) >= 5:
            kwargs.setdefault("key_mapping", RENAMED)
        return super().from_pretrained(*args, **kwargs)
'''
CODE = {  # family -> a file of llm2clip_plugin/vision that stands alone, and its classes: configuration, model
    "eva02": ("eva02", "Eva02Config", "Eva02VisionModel"),
    "openvision": ("wrapped", "OpenVisionConfig", "OpenVisionModel"),
    "timm": ("wrapped", "TimmVitConfig", "TimmTower"),
    # transformers' own give registers to LLaVA, too, which takes them for patches
    "dinov3": ("wrapped", "Dinov3TowerConfig", "Dinov3Tower"),
    "radio": ("wrapped", "RadioTowerConfig", "RadioTower"),
}
# towers that AutoModel does not open, but which are another's architecture: family -> its model_type
SAME_AS = {"metaclip2": "clip_vision_model"}
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForPreTraining")


def register() -> None:
    """Let transformers' LlavaForConditionalGeneration open the towers of this package, as far as libraries allow."""
    for file, *_ in CODE.values():  # which register their classes with AutoModel
        importlib.import_module(f"{VISION}.{file}")


def register_with_vllm() -> None:
    """The entry point ``vllm.general_plugins``: where this package is installed, ``vllm serve DIR`` knows its towers.

    vLLM calls it in every process, whatever it serves, so ``vllm_model`` is named here, not imported.
    """
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports] - in an environment of its own

    register()
    name = "LlavaForConditionalGeneration"  # of transformers' LLaVA 1.5, in config.json
    ModelRegistry.register_model(name, f"llava_integration.serve.vllm_model:{name}")


def write_code(family: str, directory: Path, arch: str = "Llava") -> dict[str, str]:
    """Write a family's code into a model's folder; ``auto_map`` of its config.json, {} if transformers has it.

    ``arch``: how the names of transformers' classes begin.
    """
    if family not in CODE:
        return {}
    file, config, model = CODE[family]
    source = inspect.getsource(importlib.import_module(f"{VISION}.{file}"))
    assert "llm2clip_plugin" not in source, f"{file}.py is to stand alone"
    (directory / f"{file}.py").write_text(source, encoding="utf-8")
    modeling = LLAVA.format(file=file, config=config, model=model, arch=arch)
    (directory / f"{MODELING}.py").write_text(modeling, encoding="utf-8")
    model = f"{MODELING}.{arch}TowerForConditionalGeneration"
    return {"AutoConfig": f"{MODELING}.{arch}TowerConfig", **dict.fromkeys(AUTO_CLASSES, model)}


# The vision tower

CARD = "llm2clip_tower.json"  # the tower's card; as llm2clip.json it would make the folder a tower directory
SIZES = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")  # kept where they equal a class's defaults
MORE_SIZES = ("num_attention_heads", "intermediate_size")  # which timm's don't have
OF_THE_FILE = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "auto_map"}


@dataclass(frozen=True, kw_only=True)
class ExportedTower:
    """A tower directory, or for a stock checkpoint the Hugging Face directory that it names."""

    directory: Path
    family: Family
    config: dict[str, Any]  # ``vision_config``
    location: TowerLocation | None  # None: not a tower of this package

    @property
    def card(self) -> TowerCard | None:
        """The tower's card without paths of this machine."""
        return published(self.location.card) if self.location else None

    @classmethod
    def of(cls, directory: Path, location: TowerLocation | None = None) -> "ExportedTower":
        """The tower in a directory, which ``location`` has found. Raises ContractError if LLaVA cannot have it:
        transformers' LLaVA does not open it, and no code is known to save with the model."""
        from transformers import AutoModel

        family, config = read_config(directory)
        if family.name in SAME_AS:
            fields = {**config.to_dict(), "model_type": SAME_AS[family.name]}
        elif family.name in CODE:
            fields = {**config.to_diff_dict(), "model_type": f"llm2clip_{family.name}"}
        elif type(config) in AutoModel._model_mapping:  # as AutoModel.from_config asks
            fields = {**config.to_diff_dict(), "model_type": config.model_type}
        else:
            told = f"towers of the family {family.name!r} cannot be exported: transformers' LLaVA does not open them"
            raise ContractError(f"{directory}: {told}, and only {', '.join(CODE)} come with code")
        fields = {key: value for key, value in fields.items() if key not in OF_THE_FILE}
        fields |= {name: getattr(config, name) for name in SIZES}
        fields |= {name: getattr(config, name) for name in MORE_SIZES if hasattr(config, name)}
        return cls(directory=directory, family=family, config=fields, location=location)

    def check_fit(self, config: dict[str, Any], where: Path) -> None:
        """Raise ContractError unless LLaVA's ``config`` selects states that the tower has, of the projector's width."""
        layer: Any = config.get("mm_vision_select_layer")
        with errors_about(f"{where}: mm_vision_select_layer {layer!r}", fix=FIX):
            blocks_below(operator.index(layer), self.config["num_hidden_layers"])
        with errors_about(where, fix=FIX):
            check_feature(config.get("mm_vision_select_feature", "patch"))
        if (width := config.get("mm_hidden_size")) != self.config["hidden_size"]:
            raise ContractError(
                f"the projector of {where} expects features of width {width}, but the tower in {self.directory} has "
                f"hidden_size {self.config['hidden_size']}; pass the tower that it was trained with as --tower"
            )

    def tensors(self, trained: LazyTensors, *, unfrozen: bool, files: ExitStack) -> LazyTensors:
        """The tower's tensors under Hugging Face's names.

        Those of the tower's directory, as LLaVA reads them; ``unfrozen``: those that LLaVA has trained take their
        place, ``trained`` being the tensors of its checkpoint. Blocks that LLaVA never runs are in the directory alone.
        """
        prefix, own = self.family.file_prefix, {}
        for path in [self.directory / WEIGHTS_FILE] if self.location else weight_files(self.directory):
            own |= open_file(path, files)
        left_out = self.family.not_tower or ("\0",)
        own = {n: t for n, t in own.items() if not n.startswith(left_out) and not n.endswith("position_ids")}
        own = {prefix + n.removeprefix(prefix): t for n, t in own.items()}  # transformers 5 saves towers without it
        if unfrozen:
            inside = f"{TOWER}vision_tower."
            new = {name.removeprefix(inside): tensor for name, tensor in trained.items() if name.startswith(inside)}
            new = {prefix + name.removeprefix(prefix): tensor for name, tensor in new.items()}
            if not new:
                raise ContractError(f"unfreeze_mm_vision_tower is set, but the checkpoint has no {inside}*; {FIX}")
            refuse_rest(set(new) - set(own), self.directory)
            own |= new
        return {f"vision_tower.{name}": tensor for name, tensor in own.items()}

    def image_processor(self, *, pads: bool) -> dict[str, Any]:
        """preprocessor_config.json: the tower's own; ``pads``: images are padded to squares, as LLaVA trained."""
        own = {**preprocessor_config(self.directory), "processor_class": "LlavaProcessor"}
        return {**own, "image_processor_type": "LlavaImageProcessor", "do_pad": True} if pads else own

    def settings(self, directory: Path, *, layer: int, feature: str, dtype: str, arch: str = "Llava") -> dict[str, Any]:
        """The tower's part of config.json; its card, and code that transformers lacks, are written to ``directory``."""
        chosen = self.selection(feature)
        del chosen["num_additional_image_tokens"]
        body = {
            **chosen,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": layer,
            "vision_config": {**self.config, "torch_dtype": dtype},
        }
        if auto_map := write_code(self.family.name, directory, arch):
            body["auto_map"] = auto_map
        if self.location and (card := self.card):
            named_place = replace(self.location, origin=card.origin)  # as in LLaVA's, without paths of this machine
            body[TOWER_KEY] = tower_record(named_place, "llm2clip", self.config["hidden_size"])
            card.write(directory / CARD)
        return body

    def selection(self, feature: str) -> dict[str, Any]:
        """Which tokens become image tokens, for ``mm_vision_select_feature``: settings of model and processor."""
        has_cls, drops_class = self.family.has_cls, self.family.has_cls and feature == "patch"
        patches = (self.config["image_size"] // self.config["patch_size"]) ** 2
        return {
            "vision_feature_select_strategy": "default" if drops_class else "full",
            "num_additional_image_tokens": int(has_cls),
            "image_seq_length": patches + int(has_cls and not drops_class),
        }


def find_tower(checkpoint: LlavaCheckpoint, tower: str = "") -> ExportedTower:
    """The tower that loading the checkpoint finds, or ``tower`` (path, registered name or Hub id).

    Raises FileNotFoundError or ContractError without that tower, or if its files are damaged.
    """
    name = str(checkpoint.config["mm_vision_tower"])
    location = None
    if is_ours(name) or tower:
        with loading(str(checkpoint.directory)):
            location = locate_tower(checkpoint.directory, name, checkpoint.config, tower)
        location.check_weights()
    found = ExportedTower.of(location.directory if location else fetch_directory(name), location)
    found.check_fit(checkpoint.config, checkpoint.directory)
    return found
