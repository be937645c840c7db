"""``llm2clip import VLM --part vision`` of damaged or strange folders: one line each, and no tower
that is none."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import own_preprocessor, read_tensors

from .test_vlm import SIZES, TEXT, llava, needs_transformers_5

pytestmark = needs_transformers_5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole LLaVA in one file."""
    folder = tmp_path_factory.mktemp("llava")
    llava().save_pretrained(folder)
    return folder


def damaged(folder, model, *, config=(), tensors=()):
    """A copy of the model with other settings of its vision part, and other tensors."""
    body = json.loads((model / "config.json").read_text())
    body["vision_config"] |= dict(config)
    (folder / "config.json").write_text(json.dumps(body))
    state = load_file(model / "model.safetensors")
    for ending, change in dict(tensors).items():
        for name, value in list(state.items()):
            if name.endswith(ending):
                state[name] = change(value)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


SETTINGS = {
    "image_size": (
        "28",
        r"\(StrictDataclass\w+: Validation error .*image_size.*expected",
    ),
    "layer_norm_eps": ("x", "Validation error for field .layer_norm_eps"),
    "num_attention_heads": (0, "ZeroDivisionError"),
    "hidden_size": (33, "multiple of the number of attention heads|Class validation"),
    "num_hidden_layers": (10**6, "num_hidden_layers 1000000, but the tower has"),
    "dtype": ("os.system", "os.system"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_wrong_type_are_one_line(tmp_path, model, name):
    value, message = SETTINGS[name]
    folder = damaged(tmp_path, model, config={name: value})
    with pytest.raises(ValueError, match=message) as caught:
        import_tower(folder, tmp_path / "tower", part="vision")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def infinite(value):
    return torch.full_like(value, float("inf"))


WEIGHTS = {
    "int8": (lambda value: (100 * value).to(torch.int8), "as quantized weights are"),
    "bool": (lambda value: value > 0, "as quantized weights are"),
    "float8": (lambda value: value.to(torch.float8_e4m3fn), "as quantized weights are"),
    "complex": (lambda value: value.to(torch.complex64), "as quantized weights are"),
    "nan": (lambda value: value * float("nan"), "has values that are not finite"),
    "inf": (infinite, "has values that are not finite"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_no_numbers_of_a_tower_are_refused(tmp_path, model, kind):
    """int8 would be read as whole numbers, without the scales that it was quantized with."""
    change, message = WEIGHTS[kind]
    folder = damaged(
        tmp_path, model, tensors={"layers.0.self_attn.q_proj.weight": change}
    )
    with pytest.raises(ValueError, match=rf"q_proj\.weight .*{message}"):
        import_tower(folder, tmp_path / "tower", part="vision")
    assert not (tmp_path / "tower").exists()


def test_a_quantization_of_the_language_model_does_not_matter(tmp_path, model):
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = damaged(tmp_path, model, config={"quantization_config": method})
    card, _ = import_tower(folder, tmp_path / "tower", part="vision")
    assert card.family == "clip"
    assert "quantization" not in (tmp_path / "tower" / "config.json").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pipe_is_no_file_of_weights(tmp_path, model, name):
    """Opening one would block."""
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a folder, a pipe or a device"):
        import_tower(tmp_path, tmp_path / "tower", part="vision")
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        read_tensors(tmp_path / name)


def test_an_image_size_of_0_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"image_size 0 is not a multiple .*; try 7"):
        import_tower(model, tmp_path / "tower", part="vision", image_size=0)


@pytest.mark.parametrize("resample", ["bicubic", 99, True])
def test_a_filter_that_pil_does_not_have_is_refused(tmp_path, resample):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"resample": resample}))
    with pytest.raises(ValueError, match=r"resample is .*, expected the number of PIL"):
        own_preprocessor(tmp_path)


QWEN = {
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "fullatt_block_indexes": (["1"], "fullatt_block_indexes has '1'"),
}


@pytest.mark.parametrize("name", QWEN)
def test_settings_that_qwens_tower_would_ignore_are_refused(tmp_path, name):
    """It would be another tower in silence."""
    import transformers

    vision = {**SIZES, "depth": 2, "num_heads": 2, "patch_size": 14, "window_size": 112}
    del vision["num_attention_heads"]
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=dict(TEXT))
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    import_tower(tmp_path, tmp_path / "whole", part="vision")
    value, message = QWEN[name]
    body = json.loads((tmp_path / "config.json").read_text())
    body["vision_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=message):
        import_tower(tmp_path, tmp_path / "tower", part="vision")
