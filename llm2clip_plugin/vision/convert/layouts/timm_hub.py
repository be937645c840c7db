"""timm's own layout on the Hub: a config.json with ``architecture`` and ``pretrained_cfg`` next to the weights.

Not in the list of layouts: its tensors have no names in common, so it is recognized by config.json.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.parsed import ParsedCheckpoint
from llm2clip_plugin.vision.convert.source_config import section
from llm2clip_plugin.vision.family import RESAMPLE

CLASSIFIER = ("head.", "fc.")
NOT_ARGUMENTS = ("num_classes", "in_chans", "img_size")  # of model_args, read elsewhere or without effect on a tower


def parse(state: dict[str, Tensor], config: dict[str, Any]) -> ParsedCheckpoint:
    """The model that ``architecture`` names, at the size of ``model_args`` or ``pretrained_cfg``, with its mean."""
    given, published = section(config, "model_args"), section(config, "pretrained_cfg")
    size = given.get("img_size") or (published.get("input_size") or [None])[-1]
    arguments = {name: value for name, value in given.items() if name not in NOT_ARGUMENTS}
    fields = tower_config(str(config["architecture"]), side_of(size), arguments)
    own = {f"image_{key}": published[key] for key in ("mean", "std") if key in published}
    if published.get("interpolation") in RESAMPLE:
        own["resample"] = RESAMPLE[published["interpolation"]]
    inside = {key for key in state if not key.startswith(CLASSIFIER)}
    return ParsedCheckpoint(
        layout="timm",
        state=state,
        config=fields | own,
        tower={f"model.{key}": state[key] for key in state if key in inside},
        used=inside,
        left_out=dict.fromkeys(state.keys() - inside, "classifier"),
    )


def side_of(size: Any) -> int | None:
    """The side of a square image from a number or a pair; ContractError for another shape."""
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise ContractError(f"img_size is {size}; only square images are supported")
    return sides.pop()


def tower_config(name: str, image_size: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the tower that a timm model makes; ValueError for an unknown model or argument."""
    from llm2clip_plugin.vision.timm_tower import make_timm, timm_config

    config = timm_config(make_timm(name, image_size, pretrained=False, arguments=arguments), name, arguments)
    config.architectures = ["TimmTower"]
    return json.loads(config.to_json_string(use_diff=False))
