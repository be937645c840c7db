"""The options of ``llm2clip llava data``."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class LlavaDataConfig(SourceConfig):
    """Captions for LLaVA's first stage, one an image."""

    output: str  # folder to write: captions.json and images; it appears when it is complete
    overwrite: bool = False  # replace what this command wrote there


COMMAND = Command(
    name="llava data",
    example="llm2clip llava data photos-tars --output photos-llava",
    about="Write captions.json and images for scripts/llava/pretrain.sh: each image with its first caption. Samples "
    "that can't be read are left out.",
    settings=LlavaDataConfig,
    arguments="path",
    everyday="output image-folder fields kinds languages overwrite",
    hidden="weight shuffle_window",
)
