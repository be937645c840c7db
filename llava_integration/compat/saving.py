"""Checkpoints that LLaVA's own environment reads, written by transformers 5; shared by the files of the models.

transformers 5 has no ``vision_model.`` in the names of a CLIP or SigLIP tower's weights, and writes ``rope_parameters``
and ``dtype`` instead of ``rope_theta``, ``rope_scaling`` and ``torch_dtype``. transformers 4.37 would ignore such
weights of a trained tower and such settings, and say nothing.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

PREFIX = "vision_model."
PLACE = "vision_tower.vision_tower."  # LLaVA's module, then the Hugging Face model in it
PARTS = {"embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head"}  # of CLIP and SigLIP


def complete_saving(model_class: Any) -> None:
    """Make ``save_pretrained`` write the names of transformers 4."""
    original = model_class.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, *arguments: Any, state_dict: Any = None, **options: Any) -> Any:
        tensors = self.state_dict() if state_dict is None else state_dict
        return original(self, *arguments, state_dict=names_of_4(tensors), **options)

    model_class.save_pretrained = save_pretrained


def names_of_4(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, those of a CLIP or SigLIP tower with ``vision_model.`` in their names; others are not renamed."""
    inside = [name.partition(PLACE)[2] for name in tensors if PLACE in name]
    layers = any(name.startswith("encoder.layers.") for name in inside)  # DINOv2 has encoder.layer.
    if not layers or {name.partition(".")[0] for name in inside} - PARTS:
        return dict(tensors)
    return {name.replace(PLACE, PLACE + PREFIX): tensor for name, tensor in tensors.items()}


def complete_config(config_class: Any) -> None:
    """Make config.json contain the names of transformers 4, too."""
    original = config_class.to_json_string

    @functools.wraps(original)
    def to_json_string(self: Any, *arguments: Any, **options: Any) -> str:
        written = json.loads(original(self, *arguments, **options))
        return json.dumps({**written, **settings_of_4(written)}, indent=2, sort_keys=True) + "\n"

    config_class.to_json_string = to_json_string


def settings_of_4(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that transformers 4 reads under other names."""
    settings = {}
    if "dtype" in written:
        settings["torch_dtype"] = written["dtype"]
    if rope := written.get("rope_parameters"):
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
        kind = rope.get("rope_type", "default")
        settings["rope_theta"] = rope.get("rope_theta", 10000.0)
        settings["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    return settings
