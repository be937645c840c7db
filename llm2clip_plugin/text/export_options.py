"""The options of ``llm2clip export-llm``."""

from dataclasses import dataclass, field
from typing import Literal

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.config import PostKind
from llm2clip_plugin.text.settings import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a fine-tuned LLM."""

    output: str  # folder to write
    layout: Literal["merged", "adapter", "sentence-transformers"] = "merged"  # merged: model folder and encoder card
    post: PostKind = "none"  # center or whiten the embeddings, fitted on --post-data
    post_data: str = ""  # captioned images whose captions are used to fit it
    post_captions: int = 20000  # maximum number of distinct captions for it
    overwrite: bool = False  # replace an existing folder
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


COMMAND = Command(
    name="export-llm",
    example="llm2clip export-llm --llm meta-llama/Llama-3.2-1B-Instruct --adapter runs/llm/adapter --output llms/cc3m",
    about="Export a fine-tuned LLM: merged weights, an adapter with its card, or a sentence-transformers folder. It is "
    "reloaded, and its embeddings are compared, before it counts.",
    settings=ExportConfig,
    everyday="llm adapter preset output format post post-data overwrite",
    shown={"layout": "format"},
)
