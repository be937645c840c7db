"""Options of ``llm2clip vlm build``; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip_plugin.options import Command


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """A vision-language model to build."""

    tower: str  # vision tower: tower directory, registered name, or Hugging Face folder or Hub id of a vision model
    llm: str  # language model with a chat template: folder or Hub id
    output: Path  # folder to write
    arch: Literal["llava", "llava_next", "llava_onevision"] = "llava"  # llava: one square; the others: tiles
    chat_template: Path | None = None  # Jinja file in place of the LLM's own template
    select_layer: int = -2  # hidden state of the tower that the projector reads; -2: before the last block
    seed: int = 0  # of the fresh projector
    compare: bool = True  # compare logits with those of tower and LLM (both models in memory, one by one)
    dry_run: bool = False  # print parameters and bytes of the parts, then exit
    overwrite: bool = False  # replace an existing folder


COMMAND = Command(
    name="vlm build",
    example="llm2clip vlm build --tower towers/clip-l14-336 --llm Qwen/Qwen3-1.7B --output vlm/qwen3",
    about="Build an untrained vision-language model from a vision tower and a language model, for transformers' "
    "Trainer, TRL and vLLM: weights of both in the LLM's dtype, a fresh projector, processor, <image> token and the "
    "LLM's chat template with a slot for images.",
    settings=VlmConfig,
    also={"mm-vision-select-layer": "select_layer"},
)
