"""One damaged tensor of every role in each layout is refused, and the advice in the message works."""

import json
import re
import shutil

import pytest
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower

from .checkpoints import RELEASE, SOURCES, damaged, open_clip_vision, whole_state

# one tensor of every role in each layout
DAMAGED = {
    "eva02": [
        "visual.blocks.1.mlp.w1.weight",
        "visual.blocks.0.attn.inner_attn_ln.bias",
        "visual.pos_embed",
        "visual.head.weight",
        "text.text_adaptor.2.fn.0.weight",
        "text.text_adaptor.4.weight",
        "text.text_adaptor.5.bias",
        "visual.cls_token",
        "visual.blocks.0.norm1.weight",
        "logit_scale",
    ],
    "release": [
        "vision_model.encoder.layers.1.mlp.fc1.weight",
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
        "text_adapter.adaptor.3.fn.3.weight",
        "text_adapter.adaptor.5.weight",
        "text_adapter.adaptor.5.bias",
        "logit_scale",
    ],
    "clip": [
        "visual_projection.weight",
        "logit_scale",
    ],
    "siglip": ["logit_scale", "logit_bias", "vision_model.head.probe"],
    "openclip": [
        "visual.class_embedding",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "visual.transformer.resblocks.1.attn.in_proj_bias",
        "visual.proj",
        "text.text_adaptor.5.bias",
        "logit_scale",
    ],
}


def damages() -> list[tuple[str, str, str]]:
    """Layout, tensor, damage; a square or a vector can be transposed without a trace, so those are left out."""
    cases = []
    for layout, keys in DAMAGED.items():
        state = whole_state(layout)
        for key in keys:
            oblong = state[key].dim() > 1 and state[key].shape[0] != state[key].shape[1]
            hows = ["missing", "renamed", *(["transposed"] if oblong else []), *(["cut"] if state[key].dim() else [])]
            cases += [(layout, key, how) for how in hows]
    return cases


@pytest.mark.parametrize("layout, key, how", damages())
def test_one_damaged_tensor_is_refused(layout, key, how, tmp_path):
    (tmp_path / "damaged").mkdir()
    save_file(damaged(whole_state(layout), key, how), tmp_path / "damaged" / "model.safetensors")
    place, config = tmp_path / "damaged", None
    if layout == "openclip":
        fields = {"model_cfg": {"vision_cfg": open_clip_vision(), "quick_gelu": True}}
        (place / "open_clip_config.json").write_text(json.dumps(fields))
    elif SOURCES[layout][0].is_dir():
        shutil.copy(SOURCES[layout][0] / "config.json", place)
    else:
        place, config = place / "model.safetensors", SOURCES[layout][1]
    with pytest.raises(ContractError) as refusal:
        import_tower(place, tmp_path / "tower", config=config)
    assert re.search(
        r"do not belong|do not match|missing|misshapen|rows|expected|specifies|but the|differs from the table",
        str(refusal.value),
    )
    assert not (tmp_path / "tower").exists() and not list(tmp_path.glob(".import-*"))


@pytest.mark.parametrize("layout, lost", [("release", "adaptor.5.bias"), ("eva02", "text_adaptor.5.bias")])
def test_what_an_error_says_to_do_helps(layout, lost, tmp_path):
    """The JSON that each refusal prints, written to a file and given as --config, and nothing else."""
    state = {k: v for k, v in whole_state(layout).items() if k != "logit_scale" and not k.endswith(lost)}
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    if layout == "release":
        shutil.copy(RELEASE / "config.json", tmp_path / "source")
    told, refusals = {}, 0
    while True:
        (tmp_path / "told.json").write_text(json.dumps(told))
        try:
            import_tower(tmp_path / "source", tmp_path / "tower", config=tmp_path / "told.json" if told else None)
            break
        except ContractError as error:
            advice = re.search(r"--config with (\{.*\})", str(error))
            assert advice and refusals < 2, str(error)
            told, refusals = told | json.loads(advice[1]), refusals + 1
    assert refusals == 2
    dual = load_dual_encoder(tmp_path / "tower")
    assert dual.logit_scale.log().item() == pytest.approx(2.6592, abs=1e-4)
    assert not dual.dual.text_adapter.projection.bias.any()
    whole, _ = import_tower(SOURCES[layout][0], tmp_path / "whole", config=SOURCES[layout][1])
    assert whole.weights_sha256 == TowerCard.read(tmp_path / "tower" / "llm2clip.json").weights_sha256
