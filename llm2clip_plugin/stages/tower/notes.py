"""What a run says about its own settings before it starts: lines for settings that are valid and rarely meant."""

import torch

from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.recipes import EMOJI_FIELD, quickstart


def notes(config: RunConfig, source: Source, device: torch.device) -> list[str]:
    """The lines for a run on ``device`` whose first training data is ``source``."""
    lines = []
    if config.data.augment == quickstart().data.augment and not _is_emoji(source):
        lines.append(
            f"the quickstart settings are for its emoji: {source.path} is mirrored, rotated and cropped as they are; "
            "for other data leave out --recipe quickstart"
        )
    if device.type == "cpu" and config.train.precision == "bf16":
        lines.append("no GPU: bf16 is slower than fp32 on most CPUs; add --precision fp32")
    return [f"note: {line}" for line in lines]


def _is_emoji(source: Source) -> bool:
    """Whether the first readable sample is one of the built-in set, or was made as those are."""
    for number in range(min(len(source), 10)):
        try:
            return EMOJI_FIELD in source.record(number).meta
        except BrokenSample:
            continue
    return False
