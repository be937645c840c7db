"""What a layout of checkpoints consists of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm2clip_plugin.vision.convert.parsed import ParsedCheckpoint
from llm2clip_plugin.vision.dual import DualEncoder


def _only_read(*_: Any) -> dict[str, Any]:
    raise NotImplementedError("this layout is only read")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of checkpoints that is recognized by its tensor names, and can be written for one family of towers.

    Without ``family`` it is only read.
    """

    name: str
    matches: Callable[[dict[str, Tensor]], bool]
    parse: Callable[[dict[str, Tensor], dict[str, Any], dict[str, Any]], ParsedCheckpoint]  # state, config, --config
    family: str = ""  # of the towers that ``visual_state`` and ``model_config`` write
    visual_state: Callable[[DualEncoder, dict[str, Tensor]], dict[str, Tensor]] = _only_read  # encoder, tower's file
    model_config: Callable[[DualEncoder], dict[str, Any]] = _only_read  # embed_dim, vision_cfg ... of OpenCLIP's file
