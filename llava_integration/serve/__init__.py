"""LLaVA models for servers and trainers: ``llm2clip llava export`` and ``vlm build``. Here their
options; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip_plugin.options import Command


@dataclass(frozen=True, kw_only=True)
class LlavaExportConfig:
    """A LLaVA checkpoint to export."""

    checkpoint: Path  # folder of a full or LoRA checkpoint
    output: Path  # folder to write
    format: Literal["hf"] = "hf"  # hf: LlavaForConditionalGeneration, safetensors
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of the weights; LLaVA loads fp16
    model_base: Path | None = None  # base model of a LoRA checkpoint; none: the one recorded
    # path, registered name or Hub id of the tower, if the checkpoint cannot find it
    tower: str = ""
    conv_mode: str = ""  # conversation template, for checkpoints that do not record it (vicuna_v1)
    compare: bool = True  # compare the result with LLaVA's code (two models in fp32, one by one)
    overwrite: bool = False  # replace an existing folder


EXPORT = Command(
    name="llava export",
    example="llm2clip llava export checkpoints/llava-7b --format hf --output hf/llava-7b",
    about="Convert a LLaVA 1.5 checkpoint into a Hugging Face model that vLLM and other servers "
    "open. Where LLaVA is installed, the result is compared with LLaVA's own code before it gets "
    "its name.",
    settings=LlavaExportConfig,
    arguments="checkpoint",
)


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """A vision-language model to build."""

    # vision tower: tower directory, registered name, or Hugging Face folder or Hub id of a vision
    # model
    tower: str
    llm: str  # language model with a chat template: folder or Hub id
    output: Path  # folder to write
    # llava: one square; the others: tiles
    arch: Literal["llava", "llava_next", "llava_onevision"] = "llava"
    chat_template: Path | None = None  # Jinja file in place of the LLM's own template
    # hidden state of the tower that the projector reads; -2: before the last block
    select_layer: int = -2
    seed: int = 0  # of the fresh projector
    # compare logits with those of tower and LLM (both models in memory, one by one)
    compare: bool = True
    dry_run: bool = False  # print parameters and bytes of the parts, then exit
    overwrite: bool = False  # replace an existing folder


VLM = Command(
    name="vlm build",
    example="llm2clip vlm build --tower towers/clip-l14-336 --llm Qwen/Qwen3-1.7B "
    "--output vlm/qwen3",
    about="Build an untrained vision-language model from a vision tower and a language model, for "
    "transformers' Trainer, TRL and vLLM: weights of both in the LLM's dtype, a fresh projector, "
    "processor, <image> token and the LLM's chat template with a slot for images.",
    settings=VlmConfig,
    also={"mm-vision-select-layer": "select_layer"},
)
