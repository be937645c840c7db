"""The modules of a dual encoder, or of an LLM, as folders of sentence-transformers: its own modules
where they compute the same, else those of ``text/embedder_modules.py``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from llm2clip_plugin.pretrained import code_of
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.text.adapter import ADAPTER_WEIGHTS, BLOCK, read_adapter
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import check_attention, read_config
from llm2clip_plugin.text.merged import write_merged
from llm2clip_plugin.vision.directory import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    fetch_directory,
    is_local,
    read_json,
    write_json,
)
from llm2clip_plugin.vision.dual import DualEncoder, TextAdapter
from llm2clip_plugin.vision.export import save_tower
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.parts import final_norm
from llm2clip_plugin.vision.towers import preprocessor_config

SETTINGS_FILE = "sentence_bert_config.json"  # of a Transformer module
CODE = "llm2clip_modules"  # the file of our modules in an exported folder
# tokens between class token and patches of transformers' own models, which ours leave out
REGISTERS = {
    "dinov2_registers": "num_register_tokens",
    "dinov3": "num_register_tokens",
    "radio": "num_summary_tokens",
    "tipsv2": "num_register_tokens",
}
STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
POOLED = {"method": "forward", "method_output_name": "pooler_output"}


class Parts:
    """Modules that are written to a folder one after another, and what a loader must know of them.

    ``prefix``: of their folders' names. ``first_in_root``: the first one lies in the folder itself.
    """

    def __init__(
        self, folder: Path, prefix: str = "", *, first_in_root: bool = False
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self.first_in_root = first_in_root
        self.types: dict[str, str] = {}  # folder -> class

    def new(self, kind: str, class_name: str) -> Path:
        """The folder of the next module; ``kind``: its class."""
        name = f"{self.prefix}{len(self.types)}_{class_name}"
        if self.first_in_root and not self.types:
            name = ""
        self.types[name] = kind
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def rename_last(self, kind: str, class_name: str) -> Path:
        """The last module's folder, for another class."""
        name, _ = self.types.popitem()
        path = self.folder / name
        renamed = self.new(kind, class_name)
        if renamed != path:
            os.replace(path, renamed)  # an empty folder
        return renamed

    def add(self, module: Any) -> None:
        """Write a module as it saves itself."""
        kind = type(module)
        home = (
            CODE if kind.__module__.startswith("llm2clip_plugin.") else kind.__module__
        )
        module.save(str(self.new(f"{home}.{kind.__name__}", kind.__name__)))

    @property
    def has_code(self) -> bool:
        """Whether one of them is of ``embedder_modules.py``."""
        return any(kind.startswith(f"{CODE}.") for kind in self.types.values())


def dense(linear: nn.Linear, activation: nn.Module | None = None) -> Any:
    """A linear layer as sentence-transformers' Dense."""
    from sentence_transformers.sentence_transformer.modules import Dense

    has_bias = linear.bias is not None
    module = Dense(
        linear.in_features,
        linear.out_features,
        bias=has_bias,
        activation_function=activation,
    )
    module.linear.load_state_dict(linear.state_dict())
    return module


def layer_norm(norm: nn.LayerNorm) -> Any:
    """A LayerNorm, whose eps is torch's default, as sentence-transformers' own."""
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    module = LayerNorm(norm.normalized_shape[0])
    module.norm.load_state_dict(norm.state_dict())
    return module


# Pictures


def write_image_parts(dual: DualEncoder, parts: Parts) -> None:
    """Tower, pooling, projection, normalization."""
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Transformer,
    )

    kind = f"{Transformer.__module__}.Transformer"
    folder = parts.new(kind, "Transformer")
    pooling = image_pooling(dual)
    save_tower(dual.tower, folder)
    if (
        family_of(dual.tower).name == "metaclip2"
    ):  # CLIP's architecture, which AutoModel opens
        config = read_json(folder / CONFIG_FILE) | {"model_type": "clip_vision_model"}
        write_json(folder / CONFIG_FILE, config)
    write_json(folder / PREPROCESSOR_FILE, preprocessor_config(dual.tower))
    outputs = STATES
    output_name = "token_embeddings"
    if pooling is None:
        outputs = POOLED
        output_name = "sentence_embedding"
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"image": outputs},
        "module_output_name": output_name,
        # torchvision's resizing differs by some levels
        "processor_kwargs": {"backend": "pil"},
    }
    write_json(folder / SETTINGS_FILE, settings)
    if pooling is not None:
        parts.add(pooling)
    if isinstance(dual.visual_norm, nn.LayerNorm):
        parts.add(layer_norm(dual.visual_norm))
    projection = dual.visual_projection
    if isinstance(projection, nn.Linear):
        parts.add(dense(projection))
    elif isinstance(projection, nn.Sequential):
        layers: Any = projection
        first, activation, last = layers
        parts.add(dense(first, activation))
        parts.add(dense(last))
    parts.add(Normalize())


def image_pooling(dual: DualEncoder) -> Any:
    """The module that pools the tower's last state; None where its own pooled output is meant."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    from llm2clip_plugin.text.embedder_modules import PatchPooling

    family = family_of(dual.tower)
    config = dual.tower.config
    width = config.hidden_size
    pool = dual.config.pool
    pools_class_token = pool == "cls" and family.name in ("clip", "metaclip2")
    if pool == "pooled" and family.name in ("radio", "internvl"):
        return Pooling(width, "cls")
    if pool == "pooled" and family.name == "aimv2" and not config.use_head:
        return Pooling(width, "mean")
    if pool == "pooled" or pools_class_token:
        return None
    first_patch = int(family.has_cls)
    if family.name == "radio":
        first_patch = 0  # its summary has a class token of each teacher
    if family.name in REGISTERS:
        first_patch += getattr(config, REGISTERS[family.name])
    if family.last_state_is_normed and family.name != "naflex":
        if pool == "cls" or (pool == "mean" and first_patch == 0):
            return Pooling(width, pool)
    if family.last_state_is_normed:
        return PatchPooling(width, pool, first_patch)
    norm: Any = final_norm(dual.tower)
    module = PatchPooling(width, pool, first_patch, norm.eps)
    module.norm.load_state_dict(norm.state_dict())
    return module


# Texts


def write_text_parts(
    encoder: CaptionEncoder,
    adapter: TextAdapter | None,
    parts: Parts,
    *,
    merge: bool,
    output: Path,
) -> None:
    """The LLM, pooling, and the text adapter if there is one. ``merge``: with its weights, else
    where they are, as seen from ``output``."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    write_llm(encoder, parts, merge=merge, output=output)
    pooling = "lasttoken" if encoder.config.pooling == "last" else "mean"
    parts.add(Pooling(encoder.width, pooling))
    write_adapter(encoder, adapter, parts)


def write_llm(
    encoder: CaptionEncoder, parts: Parts, *, merge: bool, output: Path
) -> None:
    """The LLM, as sentence-transformers' Transformer if it reads a caption by itself, without
    prompt or template, in all its blocks."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    from llm2clip_plugin.text.embedder_modules import weights_sample

    config = encoder.config
    text = {"text": STATES}
    settings: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": text,
        "module_output_name": "token_embeddings",
    }
    if merge:
        folder = parts.new(f"{Transformer.__module__}.Transformer", "Transformer")
        write_merged(encoder, folder)
        if reads_plainly(encoder) and attends_plainly(encoder, folder):
            # "</s>" in a caption is text
            how = {"text": {"split_special_tokens": True}}
            settings |= {"max_seq_length": config.max_tokens, "processing_kwargs": how}
            write_json(folder / SETTINGS_FILE, settings)
            return
        folder = parts.rename_last(f"{CODE}.Captions", "Captions")
    else:
        folder = parts.new(f"{CODE}.Captions", "Captions")
    settings["reading"] = {
        "prompt": config.prompt,
        "chat_template": config.chat_template,
        "include_bos": config.include_bos,
        "max_tokens": config.max_tokens,
        "blocks": block_count(encoder),
        "causal": config.attention == "causal",
        "revision": config.revision,
        "weights": "" if merge else weights_sample(encoder.folder),
        "trust_remote_code": runs_code(encoder),
    }
    if not merge:
        settings["llm"] = place(config.llm, output / folder.name)
    if not merge and config.adapter:
        write_peft_adapter(encoder, folder)
    write_json(folder / SETTINGS_FILE, settings)


def place(llm: str, folder: Path) -> str:
    """The LLM's Hub id, or its path relative to ``folder``; absolute where only / is shared."""
    if not is_local(llm):
        return llm
    path = os.path.realpath(os.path.expanduser(llm))
    inside = os.path.realpath(folder)
    if os.path.commonpath([path, inside]) == os.sep:
        return path
    relative = os.path.relpath(path, inside)
    return relative if relative.startswith("..") else f"./{relative}"


def block_count(encoder: CaptionEncoder) -> int:
    """Blocks below the pooled state; -1: all, and the final norm."""
    depth = (
        read_config(encoder.folder, encoder.config).get_text_config().num_hidden_layers
    )
    layer = encoder.config.layer
    count = layer if layer >= 0 else depth + 1 + layer
    return -1 if layer == -1 or count == depth else count


def reads_plainly(encoder: CaptionEncoder) -> bool:
    """Whether tokenizer and Pooling alone read a caption as the encoder does."""
    config = encoder.config
    if config.prompt or config.query_prompt or config.chat_template:
        return False
    if block_count(encoder) >= 0:
        return False
    if encoder.frame.has_bos and not config.include_bos:
        return False
    if runs_code(encoder):
        return False
    others = len(encoder.frame.head) - int(encoder.frame.has_bos)
    return others == 0 and encoder.tokenizer.pad_token_id is not None


def runs_code(encoder: CaptionEncoder) -> bool:
    """Whether the LLM is code of its own folder, run with --trust-remote-code."""
    return encoder.config.trust_remote_code and bool(code_of(encoder.folder))


def attends_plainly(encoder: CaptionEncoder, folder: Path) -> bool:
    """Whether the LLM in a folder attends as its config.json says: in StableLM and Nemotron a flag
    of their own decides."""
    with quiet_transformers():
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
    try:
        check_attention(model, encoder.config.attention, where=str(folder))
    except ValueError:
        return False
    return True


def write_peft_adapter(encoder: CaptionEncoder, folder: Path) -> None:
    """The adapter of the blocks that are used, named as in an LLM without its language head."""
    config, tensors = read_adapter(fetch_directory(encoder.config.adapter))
    config.base_model_name_or_path = None
    blocks = block_count(encoder)
    used = {}
    for name, tensor in tensors.items():
        match = BLOCK.search(name)
        if match is None or blocks < 0 or int(match[1]) < blocks:
            used[name] = tensor.contiguous()
    config.save_pretrained(str(folder))
    save_file(used, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})


def write_adapter(
    encoder: CaptionEncoder, adapter: TextAdapter | None, parts: Parts
) -> None:
    """Removed components, then the text adapter."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    from llm2clip_plugin.text.embedder_modules import CaptionAdapter

    post = encoder.post
    blocks: list[Any] = list(adapter.blocks) if adapter is not None else []
    factor = 1.0 if adapter is None else adapter.input_factor
    normalize = adapter is not None and adapter.normalize_input
    removed = 0 if post is None or post.removed is None else post.removed.shape[1]
    expansion = blocks[0].up.out_features // encoder.width if blocks else 1
    if post is not None or blocks or factor != 1.0:
        module = CaptionAdapter(
            encoder.width,
            center=post is not None,
            removed=removed,
            normalize=normalize,
            factor=factor,
            blocks=len(blocks),
            expansion=expansion,
        )
        if post is not None:
            module.mean = post.mean.clone()
        if post is not None and post.removed is not None:
            module.directions = post.removed.clone()
        for mlp, block in zip(module.mlps, blocks, strict=True):
            mlp.load_state_dict(block.state_dict())
        parts.add(module)
    elif normalize:
        parts.add(Normalize())
    if adapter is None:
        return
    if isinstance(adapter.norm, nn.LayerNorm) and isinstance(
        adapter.projection, nn.Linear
    ):
        parts.add(layer_norm(adapter.norm))
        parts.add(dense(adapter.projection))
    parts.add(Normalize())
