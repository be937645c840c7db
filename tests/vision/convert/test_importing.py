"""The import command: round trips, other resolutions, preprocessing, timm by name."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.convert import importing as command
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.towers import load_tower

from ..conftest import TRANSFORMERS_TOWERS
from .checkpoints import RELEASE, SOURCES


@pytest.mark.parametrize("name", SOURCES)
def test_import_export_import_is_identical(name, tmp_path):
    from llm2clip_plugin.stages.export import main as export_main

    source, config = SOURCES[name]
    import_tower(source, tmp_path / "one", config=config)
    assert export_main([str(tmp_path / "one"), "--output", str(tmp_path / "two")]) == 0
    assert (
        command.main([str(tmp_path / "two"), "--output", str(tmp_path / "three")]) == 0
    )
    first = TowerCard.read(tmp_path / "one" / "llm2clip.json")
    for again in ("two", "three"):
        assert TowerCard.read(tmp_path / again / "llm2clip.json") == first
        first_file, second_file = (
            tmp_path / folder / "model.safetensors" for folder in ("one", again)
        )
        assert second_file.read_bytes() == first_file.read_bytes()


def test_preprocessor_of_the_source_survives(tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    preprocessor = {
        "image_mean": [0.4, 0.5, 0.6],
        "resample": 2,
        "size": {"shortest_edge": 30},
        "crop_size": 30,
    }
    (tmp_path / "release" / "preprocessor_config.json").write_text(
        json.dumps(preprocessor)
    )
    import_tower(tmp_path / "release", tmp_path / "tower")
    written = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.4, 0.5, 0.6]
    assert written["resample"] == 2
    assert written["size"] == {"shortest_edge": 28}


LANGUAGE = ("language_model.model.embed_tokens.weight", "vision_tower.x.weight")
ELSEWHERE = {
    "paligemma": (
        "siglip_vision_model",
        LANGUAGE,
        r"--part vision --output DIR` takes out its tower \(siglip_vision_model\)",
    ),
    "llava": (
        "clip_vision_model",
        LANGUAGE,
        r"--part vision --output DIR` takes out its tower \(clip_vision_model\)",
    ),
    "qwen2_vl": (  # tensors like those of an EVA-CLIP
        "qwen2_vl_vision",
        (
            "visual.blocks.0.norm1.weight",
            "model.layers.0.mlp.up_proj.weight",
            "lm_head.weight",
        ),
        r"tower \(qwen2_vl_vision\) is of no family here: pass the vision model",
    ),
    "vit": ("", ("layernorm.weight",), r"pass timm:vit_\*"),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_models_that_are_read_elsewhere_say_where(tmp_path, kind):
    part, tensors, reason = ELSEWHERE[kind]
    config = {"model_type": kind}
    if part:
        config["vision_config"] = {"model_type": part}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name: torch.zeros(1) for name in tensors}
    save_file(weights, tmp_path / "model.safetensors")
    message = f"describes a {kind} model, .*{reason}"
    with pytest.raises(ValueError, match=message):
        import_tower(tmp_path, tmp_path / "tower")
    with pytest.raises(ValueError, match=message):
        load_tower(tmp_path)


STATED_MEAN = {"image_mean": [0.4, 0.5, 0.6]}
NOTES = [
    ({}, "image_mean and image_std; pixels get the mean [0.48"),
    (STATED_MEAN, "image_std; pixels get the standard deviation [0.26"),
]


@pytest.mark.parametrize(("stated", "message"), NOTES)
def test_the_note_about_pixels_names_the_source_and_what_is_missing(
    stated, message, tmp_path, capsys
):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TRANSFORMERS_TOWERS / "clip_vision" / name, source)
    if stated:
        (source / "preprocessor_config.json").write_text(json.dumps(stated))
    import_tower(source, tmp_path / "tower")
    error = capsys.readouterr().err
    assert f"note: {source} has no {message}" in error
    assert error.count("note:") == 1


@pytest.mark.parametrize(
    "kind, problem", [("missing", "does not exist"), ("pipe", "is a pipe or a device")]
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, kind, problem):
    source = tmp_path / "tower.safetensors"
    if kind == "pipe":
        os.mkfifo(source)
    with pytest.raises(
        FileNotFoundError, match=rf"{source} {problem}; expected a file"
    ):
        import_tower(source, tmp_path / "out")
