"""Towers of transformers through the registry, against states computed by transformers 4.37.2."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_data import make_tower
from transformers import CLIPImageProcessor

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.parts import (
    freeze_tower,
    tower_blocks,
    tower_embeddings_parameters,
)
from llm2clip_plugin.vision.resize import resize_tower, resized_from
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

from .conftest import (
    TOWERS_ALONE,
    TRANSFORMERS_TOWERS,
    WHOLE_MODELS,
    largest_difference,
    read,
)

TOLERANCE = 2e-5  # the goldens' own: 4.37.2 eager against 5.24 SDPA differs by 1.7e-6


@pytest.mark.parametrize("name", TOWERS_ALONE + WHOLE_MODELS)
def test_states_equal_the_reference(name):
    tower = load_tower(TRANSFORMERS_TOWERS / name)
    golden = read(TRANSFORMERS_TOWERS / name)
    with torch.no_grad():
        output = tower(pixel_values=golden["pixels"], output_hidden_states=True)
    expected = sorted(key for key in golden if key.startswith("hidden_states_"))
    assert len(output.hidden_states) == len(expected) == len(tower_blocks(tower)) + 1
    assert len(tower_blocks(tower)) == tower.config.num_hidden_layers
    for key, state in zip(expected, output.hidden_states, strict=True):
        assert largest_difference(state, golden[key]) < TOLERANCE, key
    assert (
        largest_difference(output.last_hidden_state, golden["last_hidden_state"])
        < TOLERANCE
    )
    assert largest_difference(output.pooler_output, golden["pooler_output"]) < TOLERANCE
    # on request alone
    assert tower(pixel_values=golden["pixels"]).hidden_states is None


CLIP_PIXELS = [
    [0.48145466, 0.4578275, 0.40821073],
    [0.26862954, 0.26130258, 0.27577711],
]
IMAGENET_PIXELS = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
PIXELS = {  # mean and standard deviation of the released towers' own preprocessors
    "clip_vision": CLIP_PIXELS,
    "clip_full": CLIP_PIXELS,
    "siglip_vision": [[0.5] * 3, [0.5] * 3],
    "siglip_full": [[0.5] * 3, [0.5] * 3],
    "dinov2": IMAGENET_PIXELS,
    "dinov2_swiglu": IMAGENET_PIXELS,
}


@pytest.mark.parametrize("name", PIXELS)
def test_without_a_preprocessor_pixels_are_normalized_as_in_pretraining(name):
    folder = TRANSFORMERS_TOWERS / name
    assert not (folder / "preprocessor_config.json").exists()
    written = preprocessor_config(folder)
    assert [written["image_mean"], written["image_std"]] == PIXELS[name]


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_resizing_moves_positions_and_nothing_else(name):
    tower = load_tower(TRANSFORMERS_TOWERS / name)
    patch = tower.config.patch_size
    before = tower.config.image_size
    larger = load_tower(TRANSFORMERS_TOWERS / name, image_size=patch * 7)
    assert larger.config.image_size == patch * 7
    assert resized_from(larger) == before
    assert tower.config.image_size == before
    assert resized_from(tower) == 0
    old = tower.state_dict()
    new = larger.state_dict()
    changed = [key for key in old if old[key].shape != new[key].shape]
    assert len(changed) == 1
    assert "position" in changed[0]
    assert all(torch.equal(old[key], new[key]) for key in old if key not in changed)
    with torch.no_grad():
        output = larger(pixel_values=torch.randn(1, 3, patch * 7, patch * 7))
    assert output.last_hidden_state.shape[1] == 49 + family_of(tower).has_cls


REFUSED = (
    r"images have \(36, 36\) pixels, but the tower expects (\d\d) x \1; "
    r".* load_tower\(..., image_size=N\)"
)


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_other_pixel_sizes_are_refused(name):
    tower = load_tower(TRANSFORMERS_TOWERS / name)
    resized = resize_tower(tower, tower.config.patch_size * 5)
    pixels = torch.randn(1, 3, 36, 36)
    for refusing in (
        tower,
        resized,
        copy.deepcopy(resized),
        pickle.loads(pickle.dumps(tower)),
    ):
        refusing.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError, match=REFUSED):
            refusing(pixel_values=pixels)
        with pytest.raises(ValueError, match=REFUSED):
            refusing(pixels, output_hidden_states=True)


def without_the_first_token(_block, _inputs, output):
    if isinstance(output, tuple):  # in transformers 4
        return output[0][:, 1:], *output[1:]
    return output[:, 1:]


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_states_with_other_tokens_than_the_patches_are_refused(name):
    native = load_tower(TRANSFORMERS_TOWERS / name)
    resized = resize_tower(native, native.config.patch_size * 5)
    for tower in (native, resized):
        tower_blocks(tower)[0].register_forward_hook(without_the_first_token)
        size = tower.config.image_size
        tokens = (size // tower.config.patch_size) ** 2 + family_of(tower).has_cls
        message = f"hidden state 1 of .* has {tokens - 1} tokens, expected [01] class tokens and"
        with pytest.raises(ValueError, match=message):
            tower(pixel_values=torch.randn(1, 3, size, size), output_hidden_states=True)


def test_resized_dinov2_is_what_transformers_5_computes_away_from_its_grid():
    golden = read(TRANSFORMERS_TOWERS / "dinov2")
    for size in (18, 42):
        tower = load_tower(TRANSFORMERS_TOWERS / "dinov2", image_size=size)
        with torch.no_grad():
            output = tower(
                pixel_values=golden[f"size{size}.pixels"], output_hidden_states=True
            )
        for i, state in enumerate(output.hidden_states):
            assert (
                largest_difference(
                    state, golden[f"v5.size{size}.hidden_states_{i:02d}"]
                )
                < TOLERANCE
            )


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_blocks_embeddings_and_freezing(name):
    tower = load_tower(TRANSFORMERS_TOWERS / name)
    below = {id(p) for p in tower_embeddings_parameters(tower)}
    inside = {id(p) for p in tower_blocks(tower).parameters()}
    above = [n for n, p in tower.named_parameters() if id(p) not in below | inside]
    assert below
    assert inside
    assert not below & inside
    parts = {name.removeprefix("vision_model.").split(".")[0] for name in above}
    assert parts <= {"post_layernorm", "layernorm", "head"}
    freeze_tower(tower, first_blocks=1)
    trainable = {id(p) for p in tower.parameters() if p.requires_grad}
    assert not trainable & below
    assert not trainable & {id(p) for p in tower_blocks(tower)[0].parameters()}
    assert {id(p) for p in tower_blocks(tower)[1].parameters()} <= trainable
    freeze_tower(tower)
    assert not any(p.requires_grad for p in tower.parameters())
    with pytest.raises(
        ValueError, match="cannot freeze the first 9 blocks: the tower has"
    ):
        freeze_tower(tower, first_blocks=9)


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    pixels = read(TRANSFORMERS_TOWERS / name)["pixels"]
    gradients = []
    for checkpointing in (False, True):
        tower = load_tower(TRANSFORMERS_TOWERS / name).train()
        if checkpointing:
            tower.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        runs = [0]
        tower_blocks(tower)[0].mlp.register_forward_pre_hook(
            lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1)
        )
        tower(pixel_values=pixels).pooler_output.square().sum().backward()
        # the block really ran again in the backward pass
        assert runs[0] == 1 + checkpointing
        gradients.append(
            {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        )
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_vision", "clip_full", "siglip_vision"])
def test_old_files_hold_position_ids(tmp_path, name):
    """openai/clip-vit-* on the hub have them; no version keeps them as a weight."""
    shutil.copytree(TRANSFORMERS_TOWERS / name, tmp_path / "tower")
    state = load_file(tmp_path / "tower" / "model.safetensors")
    rows = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    counter = {"vision_model.embeddings.position_ids": torch.arange(rows)[None]}
    save_file(
        state | counter, tmp_path / "tower" / "model.safetensors", {"format": "pt"}
    )
    load_tower(tmp_path / "tower")
    card, report = import_tower(tmp_path / "tower", tmp_path / "imported")
    assert any("(a counter, not a weight): 1 tensors" in line for line in report)
    assert (
        card.weights_sha256
        == import_tower(TRANSFORMERS_TOWERS / name, tmp_path / "plain")[
            0
        ].weights_sha256
    )


UNUSABLE = {
    "image_std": (
        [0.5, 0.0, 0.5],
        [0.5],
        0.5,
        [0.5, "a", 0.5],
        [0.5, -0.1, 0.5],
        [0.5, float("nan"), 0.5],
    ),
    "image_mean": ([0.5], [0.5, 0.5, float("inf")], "mean"),
}


@pytest.mark.parametrize(
    "name, values",
    [(name, value) for name, values in UNUSABLE.items() for value in values],
)
def test_normalization_that_no_picture_can_have(tmp_path, name, values):
    file = make_tower(tmp_path / "tower") / "preprocessor_config.json"
    file.write_text(
        json.dumps(preprocessor_config(tmp_path / "tower") | {name: values})
    )
    with pytest.raises(ContractError) as caught:
        load_tower(tmp_path / "tower")
    expected = "three numbers above 0" if name == "image_std" else "three numbers "
    assert str(caught.value).startswith(
        f"{file}: {name} is {json.loads(json.dumps(values))!r}, expected {expected}"
    )


@pytest.mark.parametrize(
    "rescaling, largest",
    [({"rescale_factor": 1 / 127.5}, 2.0), ({"do_rescale": False}, 255.0)],
)
def test_another_rescaling_gives_the_pixels_of_the_towers_own_processor(
    tmp_path, rescaling, largest
):
    """Raw values of 0 .. 2 or 0 .. 255, whose mean and deviation are as much larger."""
    folder = make_tower(tmp_path / "tower")
    mean = [0.5 * largest] * 3
    std = [0.25 * largest] * 3
    settings = preprocessor_config(folder) | rescaling
    settings |= {"image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    processor = CLIPImageProcessor.from_pretrained(folder)
    expected = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    config = ImageConfig.from_preprocessor(preprocessor_config(folder))
    assert config.mean == pytest.approx([0.5] * 3)
    normalized = Normalize(config)(torch.from_numpy(pixels)[None])
    torch.testing.assert_close(normalized, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [0, -1, "1/255", float("nan")])
def test_a_rescaling_that_no_picture_can_have(tmp_path, factor):
    file = make_tower(tmp_path / "tower") / "preprocessor_config.json"
    settings = preprocessor_config(tmp_path / "tower") | {"rescale_factor": factor}
    file.write_text(json.dumps(settings))
    with pytest.raises(ContractError, match=r"rescale_factor is .*above 0"):
        load_tower(tmp_path / "tower")


def test_a_rescaling_without_mean_and_deviation_is_refused(tmp_path):
    file = make_tower(tmp_path / "tower") / "preprocessor_config.json"
    file.write_text(json.dumps({"rescale_factor": 1 / 127.5}))
    with pytest.raises(ContractError, match="there is no image_mean"):
        load_tower(tmp_path / "tower")


def test_a_tower_without_preprocessor_says_which_normalization_it_takes(
    tmp_path, capsys
):
    file = make_tower(tmp_path / "tower") / "preprocessor_config.json"
    file.write_text(json.dumps(preprocessor_config(tmp_path / "tower")))
    load_tower(tmp_path / "tower")
    assert "note:" not in capsys.readouterr().err
    file.unlink()
    load_tower(tmp_path / "tower")
    load_tower(tmp_path / "tower")
    error = capsys.readouterr().err
    assert error.count("note:") == 1  # once in a process
    assert (
        f"{tmp_path / 'tower'} has no preprocessor_config.json; pixels get the mean [0.48145466, "
        in error
    )
    assert error.endswith("of the family 'clip'\n")
