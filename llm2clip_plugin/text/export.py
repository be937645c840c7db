"""``llm2clip export-llm``: a tuned LLM as merged weights, or as a sentence-transformers directory, same embeddings."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from llm2clip_plugin.contracts import ContractError, EncoderCard, whole_directory
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.text.adapter import attach_adapter, merge
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llm2clip_plugin.text.model import keep_layers, load_backbone
from llm2clip_plugin.text.post import PostKind, fit_post
from llm2clip_plugin.text.settings import CARD_SETTINGS, EncoderConfig

CHECKED = ["a red bicycle leans against a wall", "two dogs", "猫が眠っている"]  # embedded before and after
# of an embedding's norm: the same float32 weights, summed in another order once
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a tuned LLM out. Usage: llm2clip export-llm --llm PATH_OR_HUB_ID --adapter DIR --output DIR."""

    output: str  # the folder to write
    layout: Literal["merged", "adapter", "sentence-transformers"] = "merged"  # merged: a model folder with our card
    post: PostKind = "none"  # fold in centring or whitening of the embeddings, fitted on --post-data
    post_data: str = ""  # captioned images whose captions it is fitted on
    post_captions: int = 20000  # different captions at most
    overwrite: bool = False  # replace what is in the folder
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def export_llm(config: ExportConfig) -> Path:
    """Write the folder, reload it, compare embeddings, and only then put it in place.

    Raises ValueError for settings that the layout can't carry, ContractError if the reloaded embeddings differ.
    """
    if (config.post == "none") is bool(config.post_data):
        raise ValueError(f"post is {config.post!r} and post_data {config.post_data!r}; give both or neither")
    if config.layout == "adapter" and not config.encoder.adapter:
        raise ValueError("layout adapter copies an adapter, and none is named; give --adapter DIR")
    encoding = dataclasses.replace(config.encoder, compute_dtype="float32")
    if encoding.load_in_4bit:
        raise ValueError("4-bit weights can't take an adapter in; leave out load_in_4bit (the adapter stays the same)")
    encoder = CaptionEncoder(encoding, "cpu")
    if config.post != "none":
        encoder.post = fit_post(encoder.encode(texts_of(config), progress="captions"), config.post)
    if config.layout == "sentence-transformers":
        refuse_for_sentence_transformers(encoder)
    with whole_directory(config.output, replace=config.overwrite) as aside:
        reloading = EncoderConfig(llm=str(aside), compute_dtype="float32")
        if config.layout == "adapter":
            copy_adapter(encoder, aside)
            reloading = EncoderConfig(llm=encoding.llm, adapter=str(aside), compute_dtype="float32")
        else:
            write_merged(encoder, aside)
        if config.layout == "sentence-transformers":
            write_sentence_transformers(encoder, aside)
        compare(encoder.encode(CHECKED), CaptionEncoder(reloading, "cpu").encode(CHECKED), config.output)
    return Path(config.output)


def texts_of(config: ExportConfig) -> list[str]:
    """Different captions of the data, the first ones."""
    source = open_source(SourceConfig(path=config.post_data))
    found: dict[str, None] = {}
    for number in range(len(source)):
        found |= dict.fromkeys(caption.text for caption in source.captions(number)[1])
        if len(found) >= config.post_captions:
            break
    return list(found)[: config.post_captions]


def write_card(encoder: CaptionEncoder, folder: Path, *, base_sha256: str) -> None:
    """How the weights beside it embed, and centring or whitening where there is some."""
    EncoderCard(
        base=encoder.config.llm,
        base_sha256=base_sha256,
        **{name: vars(encoder.config)[name] for name in CARD_SETTINGS},
        post_sha256=encoder.post.save(folder) if encoder.post is not None else "",
        training={"adapter_sha256": encoder.identity().adapter_sha256},
    ).write(folder / EncoderCard.FILE)


def copy_adapter(encoder: CaptionEncoder, folder: Path) -> None:
    """The adapter's files with a new card."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(Path(encoder.config.adapter) / name, folder / name)
    write_card(encoder, folder, base_sha256=encoder.identity().weights_sha256)


def write_merged(encoder: CaptionEncoder, folder: Path) -> None:
    """Weights with the adapter added in, tokenizer, and the card; all blocks, also those above the pooled layer."""
    whole = load_backbone(encoder.folder, dataclasses.replace(encoder.config, layer=-1), torch.float32, encoder.device)
    merged_whole(whole, encoder.config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder.folder).save_pretrained(folder)
    write_card(encoder, folder, base_sha256="")  # the weights beside it are the ones


def merged_whole(model: PreTrainedModel, config: EncoderConfig) -> PreTrainedModel:
    """The adapter merged into a model with all its blocks, though it may cover the lower ones alone."""
    if not config.adapter:
        return model
    blocks, norm, depth = model.get_submodule("layers"), model.get_submodule("norm"), model.config.num_hidden_layers
    keep_layers(model, config.layer)
    merged = merge(attach_adapter(model, Path(config.adapter)))
    lower = list(merged.get_submodule("layers"))  # type: ignore[call-overload]
    merged.set_submodule("layers", nn.ModuleList([*lower, *list(blocks)[len(lower) :]]))  # type: ignore[call-overload]
    merged.set_submodule("norm", norm)
    merged.config.num_hidden_layers = depth
    return merged


def refuse_for_sentence_transformers(encoder: CaptionEncoder) -> None:
    """sentence-transformers pools the last layer, over all tokens or all but prompt and BOS, without a template."""
    config, reasons = encoder.config, []
    if encoder.post is not None:
        reasons.append("centring or whitening")
    if config.chat_template:
        reasons.append("a chat template")
    if config.layer != -1:
        reasons.append(f"layer {config.layer}")
    prompts = [prompt for prompt in (config.prompt, config.query_prompt) if prompt]
    if config.pooling == "mean" and encoder.frame.has_bos and (config.include_bos is bool(prompts)):
        reasons.append("BOS in the mean beside a prompt that isn't" if prompts else "BOS left out without a prompt")
    if config.pooling == "mean" and encoder.frame.has_bos and len(prompts) == 1:
        reasons.append("a prompt on one side alone, where BOS would count on the other")
    if any(prompt.endswith(" ") for prompt in prompts):
        reasons.append("a prompt that ends in a space (it takes the caption's first token for the prompt's)")
    if reasons:
        raise ValueError(f"sentence-transformers has no place for {' and '.join(reasons)}; use --layout merged")


def write_sentence_transformers(encoder: CaptionEncoder, folder: Path) -> None:
    """The modules that sentence-transformers builds: transformer, pooling."""
    config = encoder.config
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": encoder.width,
        "pooling_mode_mean_tokens": config.pooling == "mean",
        "pooling_mode_lasttoken": config.pooling == "last",
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "include_prompt": False,
    }
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": config.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": config.query_prompt, "document": config.prompt},
            "default_prompt_name": "document" if config.prompt else None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": pooling,
    }
    for name, body in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def compare(before_NW: torch.Tensor, after_NW: torch.Tensor, where: str) -> None:
    """Raise ContractError if embeddings differ by more than TOLERANCE of their norm."""
    worst = float(((before_NW - after_NW).norm(dim=1) / before_NW.norm(dim=1)).max())
    if not worst < TOLERANCE:
        raise ContractError(
            f"{where}: reloaded embeddings differ by {worst:.2g} of their norm, at most {TOLERANCE} allowed"
        )


def main(argv: list[str]) -> int:
    """``llm2clip export-llm --llm PATH_OR_HUB_ID --adapter DIR --output DIR [--layout sentence-transformers]``."""
    import tyro

    config = tyro.cli(tyro.conf.OmitArgPrefixes[ExportConfig], args=argv, prog="llm2clip export-llm")
    print(f"wrote {export_llm(config)}: reloaded, equal embeddings")
    return 0
