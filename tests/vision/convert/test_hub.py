"""Hugging Face's layout: vision models, image-text models, releases with a text adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower

from ..conftest import (
    TOWERS_ALONE,
    TRANSFORMERS_TOWERS,
    WHOLE_MODELS,
    largest_difference,
    read,
)
from .checkpoints import LOGITS, RELEASE, TOLERANCE


def test_clip_release(tmp_path):
    card, _ = import_tower(RELEASE, tmp_path / "tower")
    assert card.family == "clip"
    assert card.projection_dim == 20
    assert card.dual["llm_width"] == 30
    golden = read(RELEASE)
    dual = load_dual_encoder(tmp_path / "tower")
    with torch.no_grad():
        image = dual.encode_image(golden["pixels"])
        text = dual.encode_text(golden["text_input"])
        output = load_tower(tmp_path / "tower")(
            pixel_values=golden["pixels"], output_hidden_states=True
        )
    assert largest_difference(image, golden["image_embeds_normalized"]) < TOLERANCE
    assert largest_difference(text, golden["text_embeds_normalized"]) < TOLERANCE
    assert (
        largest_difference(
            dual.logit_scale * image @ text.T, golden["logits_per_image"]
        )
        < LOGITS
    )
    for i, state in enumerate(output.hidden_states):
        assert (
            largest_difference(state, golden[f"vision_hidden_states_{i:02d}"])
            < TOLERANCE
        )


@pytest.mark.parametrize("name", TOWERS_ALONE + WHOLE_MODELS)
def test_files_carry_the_names_that_4_37_2_wrote(name, tmp_path):
    """The golden file was written by 4.37.2; whatever version runs this writes the same names and
    values."""
    import_tower(TRANSFORMERS_TOWERS / name, tmp_path / "tower")
    original = read(TRANSFORMERS_TOWERS / name, "model.safetensors")
    written = read(tmp_path / "tower", "model.safetensors")
    assert written
    assert all(torch.equal(value, original[key]) for key, value in written.items())
    assert name in WHOLE_MODELS or written.keys() == original.keys()


def test_a_tower_in_shards(tmp_path):
    source = TRANSFORMERS_TOWERS / "siglip_vision"
    state = list(read(source, "model.safetensors").items())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(
        (source / "config.json").read_bytes()
    )
    files = {
        f"model-0000{i + 1}-of-00003.safetensors": dict(state[i::3]) for i in range(3)
    }
    for file, part in files.items():
        save_file(part, tmp_path / "model" / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {key: file for file, part in files.items() for key in part},
    }
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    card, _ = import_tower(tmp_path / "model", tmp_path / "one")
    assert (
        card.weights_sha256 == import_tower(source, tmp_path / "two")[0].weights_sha256
    )
    last = sorted(files)[-1]
    (tmp_path / "model" / last).unlink()
    with pytest.raises(FileNotFoundError, match=last):
        import_tower(tmp_path / "model", tmp_path / "three")


def test_models_saved_without_the_hubs_prefix_are_imported(tmp_path):
    """transformers 5 writes a CLIP that it made itself without ``vision_model.``, which 4.37 then
    can't read."""
    for name in ("clip_vision", "siglip_vision"):
        (tmp_path / name).mkdir()
        state = read(TRANSFORMERS_TOWERS / name, "model.safetensors")
        bare = {
            key.removeprefix("vision_model."): value for key, value in state.items()
        }
        save_file(bare, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_bytes(
            (TRANSFORMERS_TOWERS / name / "config.json").read_bytes()
        )
        import_tower(tmp_path / name, tmp_path / f"{name}-tower")
        assert (
            load_file(tmp_path / f"{name}-tower" / "model.safetensors").keys()
            == state.keys()
        )


@pytest.mark.parametrize("text", ["text_projection.weight", "logit_scale"])
def test_a_clip_is_not_imported_without_its_projection(text, tmp_path):
    """Its features would be another space's; one that says no word of texts is a tower alone."""
    shutil.copytree(TRANSFORMERS_TOWERS / "clip_full", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    alone = {
        name: value for name, value in state.items() if name.startswith("vision_model.")
    }
    save_file(alone, tmp_path / "model" / "model.safetensors")
    assert import_tower(tmp_path / "model", tmp_path / "tower")[0].projection_dim == 0
    save_file(alone | {text: state[text]}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(
        ContractError,
        match=r"\['visual_projection.weight'\]|\['logit_scale'\]|missing logit_scale",
    ):
        import_tower(tmp_path / "model", tmp_path / "other")
