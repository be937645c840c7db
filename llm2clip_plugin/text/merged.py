"""An LLM with its adapter merged, as a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.pretrained import AUTO_MAP
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.text.adapter import attach_adapter, merge
from llm2clip_plugin.text.config import CARD_SETTINGS
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import keep_layers, load_backbone
from llm2clip_plugin.vision.directory import CONFIG_FILE, fetch_directory


def write_merged(encoder: CaptionEncoder, folder: Path) -> None:
    """Write merged weights of all blocks, those above the pooled layer included, with tokenizer and
    card."""
    config = encoder.config
    model = load_backbone(
        encoder.folder,
        dataclasses.replace(config, layer=-1),
        torch.float32,
        encoder.device,
    )
    if config.adapter:  # it may cover only the blocks up to the pooled layer
        blocks = model.get_submodule("layers")
        norm = model.get_submodule("norm")
        depth = model.config.num_hidden_layers
        keep_layers(model, config.layer)
        model = merge(attach_adapter(model, fetch_directory(config.adapter)))
        lower = list(model.get_submodule("layers"))  # type: ignore[call-overload]
        upper = list(blocks)[len(lower) :]  # type: ignore[call-overload]
        model.set_submodule("layers", torch.nn.ModuleList([*lower, *upper]))
        model.set_submodule("norm", norm)
        model.config.num_hidden_layers = depth
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer = encoder.open_tokenizer()
    tokenizer.save_pretrained(folder)  # as it was opened
    if is_of_transformers(model) and is_of_transformers(model.config):
        forget_code(folder / CONFIG_FILE)
    if is_of_transformers(tokenizer):
        forget_code(folder / "tokenizer_config.json")
    settings = {name: vars(config)[name] for name in CARD_SETTINGS}
    post_sha256 = ""
    if encoder.post is not None:
        post_sha256 = encoder.post.save(folder)
    card = EncoderCard(
        base=config.llm,
        base_sha256="",  # the folder itself holds the weights
        **settings,
        post_sha256=post_sha256,
        training={"adapter_sha256": encoder.identity().adapter_sha256},
    )
    card.write(folder / EncoderCard.FILE)


def is_of_transformers(part: Any) -> bool:
    """Whether its class is transformers' own, not code of a model's folder."""
    return type(part).__module__.partition(".")[0] == "transformers"


def forget_code(config: Path) -> None:
    """Drop the classes that a configuration names: their files are not in the folder."""
    if not config.is_file():
        return
    body = json.loads(config.read_text(encoding="utf-8"))
    if body.pop(AUTO_MAP, None) is not None:
        config.write_text(
            json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
