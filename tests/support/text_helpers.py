"""Shared by the tests of text/ and stages/: adapters that do something."""

from pathlib import Path

import torch

from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.stages.llm_export import card_of
from llm2clip_plugin.text.adapter import save_adapter
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.finetune import trained_module
from llm2clip_plugin.train.checkpoint import TrainState


def moved(encoder: CaptionEncoder, config: FinetuneConfig, seed: int = 0):
    """The encoder with an adapter that has been moved off its start (where LoRA adds nothing)."""
    module = trained_module(encoder, config.lora, config.contrast, config.train)
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    encoder.model.eval()
    return module


def write_moved(
    llm: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    lora: LoraSettings | None = None,
    seed: int = 0,
    **settings,
) -> tuple[CaptionEncoder, Path]:
    """An encoder with a moved adapter, and that adapter's folder."""
    encoding = EncoderConfig(llm=str(llm), compute_dtype=dtype, **settings)
    config = FinetuneConfig(encoder=encoding, lora=lora or LoraSettings(dropout=0.0))
    encoder = CaptionEncoder(encoding, "cpu", trainable_adapter=True)
    moved(encoder, config, seed)
    trained = {
        name: p.detach().clone()
        for name, p in encoder.model.llm.named_parameters()
        if p.requires_grad
    }
    state = TrainState(step=1, samples=1, config={}, config_hash="", seed=0)
    save_adapter(encoder.model.llm, trained, card_of(encoder, config, state), folder)
    return encoder, folder
