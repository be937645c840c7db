"""An LLM with its adapter merged, as a folder."""

import dataclasses
from pathlib import Path

import torch

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.text.adapter import attach_adapter, merge
from llm2clip_plugin.text.config import CARD_SETTINGS
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import keep_layers, load_backbone
from llm2clip_plugin.vision.directory import fetch_directory


def write_merged(encoder: CaptionEncoder, folder: Path) -> None:
    """Write merged weights of all blocks, those above the pooled layer included, with tokenizer and
    card."""
    config = encoder.config
    model = load_backbone(
        encoder.folder, dataclasses.replace(config, layer=-1), torch.float32, encoder.device
    )
    if config.adapter:  # it may cover only the blocks up to the pooled layer
        blocks = model.get_submodule("layers")
        norm = model.get_submodule("norm")
        depth = model.config.num_hidden_layers
        keep_layers(model, config.layer)
        model = merge(attach_adapter(model, fetch_directory(config.adapter)))
        lower = list(model.get_submodule("layers"))  # type: ignore[call-overload]
        model.set_submodule("layers", torch.nn.ModuleList([*lower, *list(blocks)[len(lower) :]]))  # type: ignore[call-overload]
        model.set_submodule("norm", norm)
        model.config.num_hidden_layers = depth
    with quiet_transformers():
        model.save_pretrained(folder)
    encoder.open_tokenizer().save_pretrained(folder)  # as it was opened
    EncoderCard(
        base=config.llm,
        base_sha256="",  # the folder itself holds the weights
        **{name: vars(config)[name] for name in CARD_SETTINGS},
        post_sha256=encoder.post.save(folder) if encoder.post is not None else "",
        training={"adapter_sha256": encoder.identity().adapter_sha256},
    ).write(folder / EncoderCard.FILE)
