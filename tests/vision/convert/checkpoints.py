"""Checkpoints of every layout, from the golden references."""

import torch
from safetensors.torch import load_file

from llm2clip_plugin.vision.convert.layouts import TensorNames
from llm2clip_plugin.vision.convert.layouts.open_clip import CLIP_NAMES

from ..conftest import REFERENCE, TRANSFORMERS_TOWERS, read

CHECKPOINT = REFERENCE / "C_checkpoint"
RELEASE = REFERENCE / "F_release_directory"
EVA_FILES = ["checkpoint.pt", "checkpoint_training_layout.pt", "checkpoint.safetensors"]
# the goldens' own
TOLERANCE = 2e-5
LOGITS = 1e-4


SOURCES = {
    "eva02": (CHECKPOINT / "checkpoint.safetensors", CHECKPOINT / "config.json"),
    "release": (RELEASE, None),
    "clip": (TRANSFORMERS_TOWERS / "clip_full", None),
    "siglip": (TRANSFORMERS_TOWERS / "siglip_full", None),
    "dinov2": (TRANSFORMERS_TOWERS / "dinov2", None),
}


def to_theirs(names: TensorNames, tower: dict) -> dict:
    """A tower of up to two blocks under a layout's names."""
    inside = [
        f"{names.blocks[0]}{n}.{part}"
        for n in range(2)
        for part in (*names.inside, names.fused[0])
    ]
    rest = dict(tower)
    state = {}
    for theirs in [
        f"visual.{name}{kind}"
        for name in (*names.outside, *inside)
        for kind in ("", "weight", "bias")
    ]:
        if (ours := names.ours(theirs)) and rest.keys() >= set(ours):
            state[theirs] = torch.cat([rest.pop(name) for name in ours])
    return state


def open_clip_state_of_the_release() -> dict:
    """The CLIP-style release under OpenCLIP's names, without a folder."""
    state = read(RELEASE, "model.safetensors")
    tower = {
        name: value for name, value in state.items() if name.startswith("vision_model.")
    }
    other = {
        n.replace("text_adapter.adaptor.", "text.text_adaptor."): v
        for n, v in state.items()
        if "adaptor" in n
    }
    visual = to_theirs(CLIP_NAMES, tower) | {
        "visual.proj": state["visual_projection.weight"].T.contiguous()
    }
    return {**visual, **other, "logit_scale": state["logit_scale"]}


def whole_state(layout: str) -> dict:
    """Every tensor of a layout."""
    if layout == "openclip":
        return open_clip_state_of_the_release()
    source = SOURCES[layout][0]
    return load_file(source / "model.safetensors" if source.is_dir() else source)


def damaged(state: dict, key: str, how: str) -> dict:
    state = dict(state)
    value = state.pop(key)
    if how == "renamed":
        head, _, tail = key.rpartition(".")
        state[f"{head}_x.{tail}" if head else f"{tail}_x"] = value
    if how == "transposed":
        state[key] = value.transpose(0, 1).contiguous()
    if how == "cut":
        state[key] = value[:-1].contiguous()
    return state


def open_clip_vision(**fields) -> dict:
    """OpenCLIP's configuration of the release's tower, ``fields`` over it."""
    return {
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 7,
        "image_size": 28,
    } | fields
