"""The parts of a Hugging Face LLaVA: language model and projector, vision tower, code of our own
towers; its files.

The files are written by hand: transformers 5 drops ``vision_model.`` from a tower's names when it
saves, which servers then do not find.
"""

import importlib
import inspect
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

import llm2clip_plugin
from llava_integration.plug.towers import KEY as TOWER_KEY
from llava_integration.plug.towers import TowerLocation, tower_record
from llava_integration.serve.checkpoint import (
    FIX,
    LazyTensor,
    LazyTensors,
    open_tensors,
    refuse_rest,
    write_shards,
)
from llava_integration.serve.prompt import IMAGE
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.report_text import markdown_table
from llm2clip_plugin.vision.directory import (
    WEIGHTS_FILE,
    published,
    weight_files,
    write_json,
)
from llm2clip_plugin.vision.export import LICENSE
from llm2clip_plugin.vision.families import Family, families, read_config
from llm2clip_plugin.vision.naflex import siglip_tensor
from llm2clip_plugin.vision.towers import preprocessor_config

# The language model and the projector: settings and tensors, from LLaVA's names to Hugging Face's

# fields of a Llama's config.json, of transformers 4 and 5; the others are LLaVA's or of a file
FIELDS = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache
    pad_token_id bos_token_id eos_token_id tie_word_embeddings rope_theta rope_scaling
    rope_parameters attention_bias attention_dropout mlp_bias""".split()
PROJECTOR = {
    "mm_projector.0": "multi_modal_projector.linear_1",
    "mm_projector.2": "multi_modal_projector.linear_2",
}
TOWER = "model.vision_tower."
BUFFERS = ".rotary_emb.inv_freq"  # computed; old versions saved it
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BLOCK = """self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj
    mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm""".split()


def text_config(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """``text_config`` of the exported model: a Llama of ``tokens`` tokens."""
    text = {name: config[name] for name in FIELDS if config.get(name) is not None}
    rope = text.get("rope_parameters") or {}
    # transformers 4's name
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    return {
        **text,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokens,
    }


def hf_name(name: str) -> str:
    """The name in a file of transformers' LLaVA, which servers know, of a tensor of LLaVA's.

    >>> hf_name("model.mm_projector.2.bias"), hf_name("lm_head.weight")
    ('multi_modal_projector.linear_2.bias', 'language_model.lm_head.weight')
    """
    layer, _, kind = name.removeprefix("model.").rpartition(".")
    if layer in PROJECTOR:
        return f"{PROJECTOR[layer]}.{kind}"
    return f"language_model.{name}"


def language_tensors(
    tensors: LazyTensors, config: dict[str, Any], tokens: int, where: Path
) -> LazyTensors:
    """The language model's and the projector's tensors under Hugging Face's names, with a row for
    ``<image>``.

    ``tokens``: rows of the embedding that LLaVA uses. Raises ContractError for tensors that are
    missing or unknown, or an embedding with fewer rows.
    """
    llm_tensors = {}
    for name, tensor in tensors.items():
        if not name.startswith(TOWER) and not name.endswith(BUFFERS):
            llm_tensors[name] = tensor
    is_tied = bool(config.get("tie_word_embeddings"))
    check_language(llm_tensors, config["num_hidden_layers"], where, is_tied=is_tied)
    for name in {EMBEDDING, HEAD} & set(llm_tensors):
        rows = llm_tensors[name].shape[0]
        if rows < tokens:
            raise ContractError(
                f"{where}: {name} has {rows} rows, the tokenizer {tokens} tokens; {FIX}"
            )
        llm_tensors[name] = with_image_row(llm_tensors[name], tokens)
    if is_tied:
        llm_tensors.pop(HEAD, None)
    return {hf_name(name): tensor for name, tensor in llm_tensors.items()}


def check_language(
    tensors: LazyTensors, blocks: int, where: Path, *, is_tied: bool
) -> None:
    """Raise ContractError unless the tensors are those of a Llama of ``blocks`` and of the
    projector."""
    wanted = [EMBEDDING]
    optional = {HEAD}
    for block in range(blocks):
        for part in BLOCK:
            wanted.append(f"model.layers.{block}.{part}.weight")
            if "norm" not in part:
                optional.add(f"model.layers.{block}.{part}.bias")
    wanted.append("model.norm.weight")
    if not is_tied:
        wanted.append(HEAD)
    for layer in PROJECTOR:
        wanted += [f"model.{layer}.weight", f"model.{layer}.bias"]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        count = f"{len(missing)} of {len(wanted)} tensors are missing"
        raise ContractError(f"{where}: {count}, such as {missing[0]}; {FIX}")
    refuse_rest(set(tensors) - set(wanted) - optional, where)


def with_image_row(rows: LazyTensor, tokens: int, *, added: int = 1) -> LazyTensor:
    """The first ``tokens`` rows and their mean, ``added`` times, the last for ``<image>``.

    In the embedding it is replaced by the image. In the head it makes the token's logit the mean of
    all logits, which is never the largest: the model answers as without it.
    """

    def read() -> Tensor:
        kept = rows.read()[:tokens]
        mean = kept.float().mean(0, keepdim=True).to(kept.dtype)
        return torch.cat((kept, mean.expand(added, -1)))

    shape = (tokens + added, rows.shape[1])
    return LazyTensor(shape=shape, read=read, where=rows.where)


# The code of towers that transformers does not have, saved with a model: ``trust_remote_code`` runs
# it anywhere. Where this package is installed, ``register`` is enough, and no code of the model's
# is run.

VISION = "llm2clip_plugin.vision"
MODELING = "modeling_llava_tower"
LLAVA = '''\
"""{arch} with the vision tower of {file}.py."""

import transformers
from transformers import AutoConfig, AutoModel, {arch}Config, {arch}ForConditionalGeneration

from .{file} import {config}, {model}

AutoConfig.register({config}.model_type, {config}, exist_ok=True)
AutoModel.register({config}, {model}, exist_ok=True)

# of the tensors in files to those in memory; transformers 5 applies its own to its own classes \
alone
RENAMED = {{"^language_model.lm_head": "lm_head", "^language_model.model": "model.language_model"}}
RENAMED |= {{f"^{{name}}": f"model.{{name}}" \
for name in ("vision_tower", "multi_modal_projector", "image_newline")}}


class {arch}TowerConfig({arch}Config):
    pass


class {arch}TowerForConditionalGeneration({arch}ForConditionalGeneration):
    config_class = {arch}TowerConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if int(transformers.__version__.split(".")[0]) >= 5:
            kwargs.setdefault("key_mapping", RENAMED)
        return super().from_pretrained(*args, **kwargs)
'''
AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoModelForPreTraining",
)


def register() -> None:
    """Let transformers' LlavaForConditionalGeneration open the towers of this package, as far as
    libraries allow."""
    for family in families().values():
        if family.code is not None:
            # the file registers its classes with AutoModel
            importlib.import_module(f"{VISION}.{family.code.file}")


def register_with_vllm() -> None:
    """The entry point ``vllm.general_plugins``: where this package is installed, ``vllm serve DIR``
    knows its towers.

    vLLM calls it in every process, whatever it serves, so ``vllm_model`` is named here, not
    imported.
    """
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports] - in an environment of its own

    register()
    name = "LlavaForConditionalGeneration"  # of transformers' LLaVA 1.5, in config.json
    ModelRegistry.register_model(name, f"llava_integration.serve.vllm_model:{name}")


def write_code(family: Family, directory: Path, arch: str) -> dict[str, Any]:
    """Write a family's code into a model's folder; the ``auto_map`` of its config.json, {} if
    transformers has it.

    ``arch``: how the names of transformers' classes begin.
    """
    code = family.code
    if code is None:
        return {}
    source = inspect.getsource(importlib.import_module(f"{VISION}.{code.file}"))
    # the file imports nothing of ours
    (directory / f"{code.file}.py").write_text(source, encoding="utf-8")
    modeling = LLAVA.format(
        file=code.file, config=code.config, model=code.model, arch=arch
    )
    (directory / f"{MODELING}.py").write_text(modeling, encoding="utf-8")
    model = f"{MODELING}.{arch}TowerForConditionalGeneration"
    return {
        "auto_map": {
            "AutoConfig": f"{MODELING}.{arch}TowerConfig",
            **dict.fromkeys(AUTO_CLASSES, model),
        }
    }


# The vision tower

# the tower's card; as llm2clip.json it would make the folder a tower directory
CARD = "llm2clip_tower.json"
# kept where they equal a class's defaults
SIZES = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")
MORE_SIZES = ("num_attention_heads", "intermediate_size")  # which timm's don't have
OF_THE_FILE = {
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "architectures",
    "auto_map",
}


@dataclass(frozen=True, kw_only=True)
class ExportedTower:
    """A tower directory, or for a stock checkpoint the Hugging Face directory that it names."""

    directory: Path
    family: Family
    config: dict[str, Any]  # ``vision_config``
    location: TowerLocation | None  # None: not a tower of this package

    @classmethod
    def of(
        cls, directory: Path, location: TowerLocation | None = None
    ) -> "ExportedTower":
        """The tower in a directory, which ``location`` has found. Raises ContractError if LLaVA
        cannot have it: transformers' LLaVA does not open it, and no code is known to save with the
        model."""
        from transformers import AutoModel

        family, config = read_config(directory)
        if family.opens_as:
            fields = {**config.to_dict(), "model_type": family.opens_as}
        elif family.code is not None:
            fields = {**config.to_diff_dict(), "model_type": f"llm2clip_{family.name}"}
        elif type(config) in AutoModel._model_mapping:  # as AutoModel.from_config asks
            fields = {**config.to_diff_dict(), "model_type": config.model_type}
        else:
            with_code = [
                name for name, other in families().items() if other.code is not None
            ]
            raise ContractError(
                f"{directory}: towers of the family {family.name!r} cannot be exported: "
                "transformers' LLaVA does not open them, and only "
                f"{', '.join(with_code)} come with code"
            )
        fields = {key: value for key, value in fields.items() if key not in OF_THE_FILE}
        for name in SIZES:
            fields[name] = getattr(config, name)
        for name in MORE_SIZES:
            if hasattr(config, name):
                fields[name] = getattr(config, name)
        return cls(directory=directory, family=family, config=fields, location=location)

    def tensors(
        self, files: ExitStack, trained: LazyTensors | None = None
    ) -> LazyTensors:
        """The tower's tensors under Hugging Face's names: those of its directory, as LLaVA reads
        them.

        ``trained``: tensors of a LLaVA checkpoint whose tower was unfrozen, which take their place.
        Blocks that LLaVA never runs are in the directory alone.
        """
        tower_tensors = self.stored_tensors(files)
        if trained is not None:
            new = {}
            inside = f"{TOWER}vision_tower."
            for name, tensor in trained.items():
                if name.startswith(inside):
                    new[self.file_name(name.removeprefix(inside))] = tensor
            if not new:
                raise ContractError(
                    f"its tower was trained, but the checkpoint has no {inside}*; {FIX}"
                )
            refuse_rest(set(new) - set(tower_tensors), self.directory)
            tower_tensors |= new
        if self.family.name == "naflex":
            tower_tensors |= self.as_siglip(tower_tensors)
        return {
            f"vision_tower.{name}": tensor for name, tensor in tower_tensors.items()
        }

    def file_name(self, name: str) -> str:
        """A tensor's name with the family's prefix, without which transformers 5 saves towers."""
        prefix = self.family.file_prefix
        return prefix + name.removeprefix(prefix)

    def stored_tensors(self, files: ExitStack) -> LazyTensors:
        """The tensors in the tower's directory, without those of a text tower and the like."""
        if self.location:
            paths = [self.directory / WEIGHTS_FILE]
        else:
            paths = weight_files(self.directory)
        left_out = self.family.not_tower or ("\0",)
        stored = {}
        for name, tensor in open_tensors(paths, files).items():
            if not name.startswith(left_out) and not name.endswith("position_ids"):
                stored[self.file_name(name)] = tensor
        return stored

    def as_siglip(self, tensors: LazyTensors) -> LazyTensors:
        """The tensors of a NaFlex tower that a SigLIP has in another shape."""
        size = self.config["image_size"]
        side = self.config["patch_size"]
        width = self.config["hidden_size"]
        grid = size // side

        def read(name: str, tensor: LazyTensor) -> Tensor:
            return siglip_tensor(name, tensor.read(), side, grid)

        shapes = {
            "patch_embedding": (width, 3, side, side),
            "position_embedding": (grid**2, width),
        }
        reshaped = {}
        for part, shape in shapes.items():
            name = self.file_name(f"embeddings.{part}.weight")
            tensor = tensors[name]
            reshaped[name] = replace(
                tensor, shape=shape, read=partial(read, name, tensor)
            )
        return reshaped


# The folder

TEMPLATE = "chat_template.jinja"
ONEVISION = "llava_onevision"
VIDEO = "<video>"
# how their names begin
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", ONEVISION: "LlavaOnevision"}
TILES = {  # grids (rows, columns) that an image may be cut into
    "llava_next": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    ONEVISION: tuple(
        (rows, columns) for rows in range(1, 7) for columns in range(1, 7)
    ),
}
# of OneVision; features of more are interpolated
MOST_TILES = {"vision_aspect_ratio": "anyres_max_9"}


def write_folder(
    directory: Path,
    tower: ExportedTower,
    tensors: LazyTensors,
    *,
    title: str,
    what: str,  # the model is, for README.md
    # where config.json records it, without paths of this machine
    made_from: tuple[str, dict[str, Any]],
    arch: str = "llava",
    layer: int,  # of the tower
    feature: str = "patch",  # LLaVA's mm_vision_select_feature
    pads: bool = True,  # images are padded to squares, as LLaVA trains; else cropped
    dtype: torch.dtype,
    text: dict[str, Any],  # text_config
    slots: dict[str, int],  # image_token_index and the like
    ids: dict[str, Any],  # bos_token_id and the like
    generation: dict[str, Any],
    template: str,
) -> int:
    """Write every file but the tokenizer's; the bytes of the weights."""
    size = write_shards(tensors, directory, dtype)
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    classes = CLASSES[arch]
    stored = str(dtype).removeprefix("torch.")
    record_key, record = made_from
    record = {"version": llm2clip_plugin.__version__, **record}
    drops_class = tower.family.has_cls and feature == "patch"
    processor = write_processor(
        directory, tower, arch, drops_class=drops_class, pads=pads
    )
    code = write_code(tower.family, directory, classes)
    body = {
        "architectures": [f"{classes}ForConditionalGeneration"],
        "model_type": arch,
        **slots,
        **processor,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layer,
        "vision_config": {**tower.config, "torch_dtype": stored},
        "text_config": {**text, "torch_dtype": stored},
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        "torch_dtype": stored,
        **ids,
        **code,
        record_key: record,
    }
    if tower.location:  # whose terms the model inherits
        card = published(tower.location.card)
        # as in LLaVA's, without paths of this machine
        location = replace(tower.location, origin=card.origin)
        width = tower.config["hidden_size"]
        body[TOWER_KEY] = tower_record(location, "llm2clip", width)
        card.write(directory / CARD)
    write_json(directory / "config.json", body)
    write_json(directory / "generation_config.json", {**ids, **generation})
    write_page(directory, title, what, arch, tower, record, runs_code=bool(code))
    return size


def write_page(
    directory: Path,
    title: str,
    what: str,
    arch: str,
    tower: ExportedTower,
    record: dict[str, Any],
    *,
    runs_code: bool,
) -> None:
    """README.md, of what `write_folder` was given. ``runs_code``: transformers needs the code that
    is in the folder."""
    served = ""
    if arch == "llava":
        served = SERVED if tower.config["model_type"] in STOCK else SERVED + PLUGIN
    page = PAGE.substitute(
        title=title,
        what=what,
        rows=readme_rows(record, tower),
        license=LICENSE,
        served=served,
        option=", trust_remote_code=True" if runs_code else "",
    )
    (directory / "README.md").write_text(page, encoding="utf-8")


def readme_rows(record: dict[str, Any], tower: ExportedTower) -> str:
    """README.md's table: what the model was made from."""
    rows = []
    for name, value in record.items():
        if value:
            rows.append((name.replace("_", " "), f"`{value}`"))
    if tower.location:
        card = published(tower.location.card)
        rows.append(("tower started from", f"`{card.origin}`"))
        teacher = card.teacher.get("llm", "")
        if teacher:
            rows.append(("tower's teacher", teacher))
    return markdown_table(("", ""), rows)


def write_processor(
    directory: Path, tower: ExportedTower, arch: str, *, drops_class: bool, pads: bool
) -> dict[str, Any]:
    """Write how images become pixels and tokens; what config.json says of it."""
    kind = CLASSES[arch]
    side = tower.config["image_size"]
    patch = tower.config["patch_size"]
    extra = int(tower.family.has_cls)
    tokens = (side // patch) ** 2 + extra  # of the tower
    settings: dict[str, Any] = {
        "vision_feature_select_strategy": "default" if drops_class else "full"
    }
    counts = {"image_token": IMAGE, **settings}
    images = preprocessor_config(tower.directory, square=True)
    images["processor_class"] = f"{kind}Processor"
    if pads:
        images["image_processor_type"] = f"{kind}ImageProcessor"
        images["do_pad"] = True
    if arch == ONEVISION:  # resizes tiles, and frames of videos, to the tower's square
        images.pop("crop_size", None)
        images["size"] = {"height": side, "width": side}
        images["do_center_crop"] = False
        videos = dict(images)
        videos.pop("image_processor_type", None)
        videos.pop("do_pad", None)
        videos["video_processor_type"] = f"{kind}VideoProcessor"
        write_json(directory / "video_preprocessor_config.json", videos)
        counts |= {"num_image_tokens": tokens, "video_token": VIDEO, **MOST_TILES}
        settings |= MOST_TILES
    else:
        counts |= {"patch_size": patch, "num_additional_image_tokens": extra}
    if arch in TILES:
        grids = [[rows * side, columns * side] for rows, columns in TILES[arch]]
        settings["image_grid_pinpoints"] = grids
        images["image_grid_pinpoints"] = grids
    write_json(directory / "preprocessor_config.json", images)
    counts["processor_class"] = f"{kind}Processor"
    write_json(directory / "processor_config.json", counts)
    return {**settings, "image_seq_length": tokens - 1 if drops_class else tokens}


SERVED = "`vllm serve PATH_OR_HUB_ID` serves it with an OpenAI-compatible API"
STOCK = ("clip_vision_model", "siglip_vision_model")  # towers that vLLM has
PLUGIN = (
    " where llm2clip-plugin with its extra `tower` is "
    "installed with vLLM, for the vision tower"
)
PAGE = Template("""\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: other
tags:
- llava
- llm2clip
---

# $title

$what

$rows
$license
## Use

`AutoProcessor` and `AutoModelForImageTextToText.from_pretrained("PATH_OR_HUB_ID"$option)` \
of transformers open it.
$served
""")
