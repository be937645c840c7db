"""LLaVA models for servers and trainers: ``llm2clip llava export`` and ``vlm build``. Here their
options; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip_plugin.options import Command, setting


@dataclass(frozen=True, kw_only=True)
class LlavaExportConfig:
    """A LLaVA checkpoint to export."""

    checkpoint: Path = setting(help="folder of a full or LoRA checkpoint")
    output: Path = setting(help="folder to write")
    format: Literal["hf"] = setting(
        "hf", help="hf: LlavaForConditionalGeneration, safetensors"
    )
    dtype: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16",
        help="type of the weights; LLaVA loads fp16",
    )
    model_base: Path | None = setting(
        None,
        help="base model of a LoRA checkpoint; none: the one recorded",
    )
    tower: str = setting(
        "",
        help="path, registered name or Hub id of the tower, if the checkpoint cannot find it",
    )
    conv_mode: str = setting(
        "",
        help="conversation template, for checkpoints that do not record it (vicuna_v1)",
    )
    compare: bool = setting(
        True,
        help="compare the result with LLaVA's code (two models in fp32, one by one)",
    )
    overwrite: bool = setting(False, help="replace an existing folder")


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

    tower: str = setting(
        help="vision tower: tower directory, registered name, or Hugging Face folder or Hub id of "
        "a vision model",
    )
    llm: str = setting(help="language model with a chat template: folder or Hub id")
    output: Path = setting(help="folder to write")
    arch: Literal["llava", "llava_next", "llava_onevision"] = setting(
        "llava",
        help="llava: one square; the others: tiles",
    )
    chat_template: Path | None = setting(
        None, help="Jinja file in place of the LLM's own template"
    )
    select_layer: int = setting(
        -2,
        help="hidden state of the tower that the projector reads; -2: before the last block",
        also=("mm-vision-select-layer",),
    )
    seed: int = setting(0, help="seed of the fresh projector")
    compare: bool = setting(
        True,
        help="compare logits with those of tower and LLM (both models in memory, one by one)",
    )
    dry_run: bool = setting(
        False, help="print parameters and bytes of the parts, then exit"
    )
    overwrite: bool = setting(False, help="replace an existing folder")


VLM = Command(
    name="vlm build",
    example="llm2clip vlm build --tower towers/clip-l14-336 --llm Qwen/Qwen3-1.7B "
    "--output vlm/qwen3",
    about="Build an untrained vision-language model from a vision tower and a language model, for "
    "transformers' Trainer, TRL and vLLM: weights of both in the LLM's dtype, a fresh projector, "
    "processor, <image> token and the LLM's chat template with a slot for images.",
    settings=VlmConfig,
)
