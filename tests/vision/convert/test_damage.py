"""One damaged tensor of every role in each layout is refused."""

import json
import shutil

import pytest
from safetensors.torch import save_file

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower

from .checkpoints import SOURCES, damaged, open_clip_vision, whole_state

# one tensor of every role in each layout
TEXT = "text.text_adaptor."
CLIPS = "visual.transformer.resblocks."
EVAS = "visual.blocks.0.attn."
DAMAGED = {
    "eva02": [
        f"{EVAS}inner_attn_ln.bias",
        "visual.pos_embed",
        "visual.head.weight",
        f"{TEXT}2.fn.0.weight",
    ],
    "release": [
        "vision_model.encoder.layers.1.mlp.fc1.weight",
        "text_adapter.adaptor.3.fn.3.weight",
    ],
    "clip": ["visual_projection.weight"],
    "siglip": ["logit_bias", "vision_model.head.probe"],
    "openclip": [
        "visual.conv1.weight",
        "visual.positional_embedding",
        f"{CLIPS}1.attn.in_proj_bias",
        "visual.proj",
    ],
}
DAMAGED = {layout: [*names, "logit_scale"] for layout, names in DAMAGED.items()}
DAMAGED["release"] += ["visual_projection.weight", "text_adapter.adaptor.5.bias"]
for layout in ("eva02", "openclip"):
    DAMAGED[layout].append(f"{TEXT}5.bias")


def damages() -> list[tuple[str, str, str]]:
    """Layout, tensor, damage; a square or a vector can be transposed without a trace, so those are
    left out."""
    cases = []
    for layout, keys in DAMAGED.items():
        state = whole_state(layout)
        for key in keys:
            oblong = state[key].dim() > 1 and state[key].shape[0] != state[key].shape[1]
            hows = [
                "missing",
                "renamed",
                *(["transposed"] if oblong else []),
                *(["cut"] if state[key].dim() else []),
            ]
            cases += [(layout, key, how) for how in hows]
    return cases


@pytest.mark.parametrize("layout, key, how", damages())
def test_one_damaged_tensor_is_refused(layout, key, how, tmp_path):
    (tmp_path / "damaged").mkdir()
    save_file(
        damaged(whole_state(layout), key, how),
        tmp_path / "damaged" / "model.safetensors",
    )
    path = tmp_path / "damaged"
    config = None
    if layout == "openclip":
        fields = {"model_cfg": {"vision_cfg": open_clip_vision(), "quick_gelu": True}}
        (path / "open_clip_config.json").write_text(json.dumps(fields))
    elif SOURCES[layout][0].is_dir():
        shutil.copy(SOURCES[layout][0] / "config.json", path)
    else:
        path = path / "model.safetensors"
        config = SOURCES[layout][1]
    says = (
        "do not belong|do not match|missing|misshapen|rows|expected|specifies|but the"
        "|differs from the table"
    )
    with pytest.raises(ContractError, match=says):
        import_tower(path, tmp_path / "tower", config=config)
    assert not (tmp_path / "tower").exists()
    assert not list(tmp_path.glob(".import-*"))
