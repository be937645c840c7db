"""The surface of a tower, for every backbone, against LLaVA's own CLIPVisionTower and the plain
Hugging Face model."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from llava.mm_utils import process_images
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava_world import HALF_ON_CPU
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from llava_integration.plug.tower import MultiscaleVisionTower, device_of_map
from llava_integration.plug.towers import KEY
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.hashes import sha256_weights
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

pytestmark = pytest.mark.usefixtures("home")
BACKBONES = ("clip", "siglip", "dinov2", "eva02")


def arguments(tower, layer=-2, feature="patch", **more):
    """What LLaVA passes: its model arguments."""
    return SimpleNamespace(
        vision_tower=str(tower),
        mm_vision_select_layer=layer,
        mm_vision_select_feature=feature,
        **more,
    )


def pixels(count=3, size=28, dtype=torch.float32):
    return torch.randn(
        count, 3, size, size, generator=torch.Generator().manual_seed(0)
    ).to(dtype)


@pytest.mark.parametrize("layer", [-2, -1, -4, 0, 1])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=HALF_ON_CPU)],
)
def test_bit_for_bit_as_llavas_own_tower(world, layer, feature, dtype):
    args = arguments(f"llm2clip:{world.towers['clip']}", layer, feature)
    ours = build_vision_tower(args)
    theirs = CLIPVisionTower(str(world.towers["clip"]), args)
    for tower in (ours, theirs):
        tower.to(dtype=dtype)
    images = pixels()
    assert torch.equal(ours(images), theirs(images))
    assert ours(images).dtype == torch.float32 == theirs(images).dtype
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours(list(images)), theirs(list(images)), strict=True)
    )
    for name in (
        "hidden_size",
        "num_patches",
        "num_patches_per_side",
        "dtype",
        "device",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert torch.equal(ours.dummy_feature, theirs.dummy_feature)


def test_images_are_prepared_as_by_llavas_own_tower(world):
    args = arguments(world.towers["clip"])
    ours = build_vision_tower(args).image_processor
    theirs = CLIPVisionTower(args.vision_tower, args).image_processor
    image = Image.open(next(world.images.iterdir()))
    for config in (SimpleNamespace(image_aspect_ratio="pad"), SimpleNamespace()):
        assert torch.equal(
            process_images([image], ours, config),
            process_images([image], theirs, config),
        )


@pytest.mark.parametrize("side", [16, 24])
def test_naflex_reads_squares(tmp_path, side):
    """In LLaVA's environment it is a SigLIP: its patches a convolution, its positions those of the
    square."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"patch_size": 4, "image_size": 16}
    siglip = SiglipVisionModel(
        SiglipVisionConfig(**sizes, hidden_act="gelu_pytorch_tanh")
    ).eval()
    state = {
        name: value
        for name, value in siglip.state_dict().items()
        if not name.endswith("position_ids")
    }
    name = "vision_model.embeddings.patch_embedding.weight"
    state[name] = state[name].permute(0, 2, 3, 1).flatten(1)
    save_file(
        {key: value.contiguous() for key, value in state.items()},
        tmp_path / "model.safetensors",
    )
    config = {
        **sizes,
        "model_type": "siglip2_vision_model",
        "num_patches": 16,
        "image_size": side,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(preprocessor_config(tmp_path))
    )
    card = {
        "family": "naflex",
        "has_cls": False,
        "num_layers": 2,
        "hidden_size": 32,
        "patch_size": 4,
    }
    hashed = sha256_weights(tmp_path / "model.safetensors")
    TowerCard(**card, image_size=side, origin="here", weights_sha256=hashed).write(
        tmp_path / TowerCard.FILE
    )
    tower = build_vision_tower(arguments(f"llm2clip:{tmp_path}"))
    assert tower.num_patches == (side // 4) ** 2
    image = process_images(
        [Image.new("RGB", (40, 30))],
        tower.image_processor,
        SimpleNamespace(image_aspect_ratio="pad"),
    )
    assert image.shape == (1, 3, side, side)
    assert tower(image).shape == (1, tower.num_patches, 32)
    if side == 16:
        images = pixels(size=16)
        assert torch.allclose(
            tower(images),
            siglip(images, output_hidden_states=True).hidden_states[-2],
            atol=1e-6,
        )
    with pytest.raises(ValueError, match="transformers"):
        tower.vision_tower(pixels(size=side), spatial_shapes=torch.tensor([[2, 3]]))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_one_meaning_of_layer_and_feature_for_every_backbone(
    world, backbone, layer, feature
):
    tower = build_vision_tower(arguments(world.towers[backbone], layer, feature))
    plain = load_tower(world.towers[backbone])
    with torch.no_grad():
        states = plain(pixel_values=pixels(), output_hidden_states=True).hidden_states[
            layer
        ]
    cls = 0 if backbone == "siglip" else 1
    assert states.shape[1] == 4 + cls
    assert torch.equal(
        tower(pixels()), states[:, cls:] if feature == "patch" else states
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cls_patch_without_a_class_token_is_noted(world, tmp_path, capsys, backbone):
    tower = tmp_path / backbone
    tower.symlink_to(world.towers[backbone])
    build_vision_tower(arguments(tower, feature="patch"), delay_load=True)
    assert "cls_patch" not in capsys.readouterr().err
    build_vision_tower(arguments(tower, feature="cls_patch"), delay_load=True)
    note = f"the states of {tower} (siglip) have no class token; its features are the patches"
    assert (note in capsys.readouterr().err) == (backbone == "siglip")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_surface(world, backbone):
    tower = build_vision_tower(arguments(world.towers[backbone]))
    features = tower(pixels(dtype=torch.float16))
    assert features.shape == (3, tower.num_patches, tower.hidden_size) == (3, 4, 32)
    assert features.dtype == torch.float16
    assert tower.dtype == torch.float32
    assert not features.requires_grad
    assert tower.is_loaded
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any("mm_projector" in name for name, _ in tower.named_parameters())
    processor = tower.image_processor
    image = Image.new("RGB", (50, 40))
    assert processor.preprocess(image, return_tensors="pt")["pixel_values"][
        0
    ].shape == (3, 28, 28)
    assert processor([image, image], return_tensors="pt")["pixel_values"].shape == (
        2,
        3,
        28,
        28,
    )
    assert (
        processor.crop_size["height"]
        == processor.crop_size["width"]
        == processor.size["shortest_edge"]
        == 28
    )
    assert len(processor.image_mean) == 3
    assert len(tower(list(pixels()))) == 3
    assert tower(list(pixels()))[0].shape == (1, 4, 32)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_delay_load_knows_widths_before_weights_are_read(world, tmp_path, backbone):
    copy = tmp_path / "tower"
    shutil.copytree(world.towers[backbone], copy)
    (copy / "model.safetensors").unlink()
    tower = build_vision_tower(arguments(copy), delay_load=True)
    assert not tower.is_loaded
    assert list(tower.parameters()) == []
    assert tower.hidden_size == 32
    assert tower.num_patches == 4
    assert tower.num_patches_per_side == 2
    assert tower.config.image_size == 28
    assert tower.config.patch_size == 14
    assert tower.config.hidden_size == 32
    assert tower.dummy_feature.shape == (1, 32)
    shutil.copy(world.towers[backbone] / "model.safetensors", copy)
    tower.load_model(device_map="auto")
    assert tower.is_loaded
    assert tower(pixels()).shape == (3, 4, 32)


def test_blocks_above_the_selected_state_are_dropped(world):
    assert (
        len(
            build_vision_tower(
                arguments(world.towers["clip"])
            ).vision_tower.vision_model.encoder.layers
        )
        == 2
    )
    assert (
        len(
            build_vision_tower(
                arguments(world.towers["clip"], -1)
            ).vision_tower.vision_model.encoder.layers
        )
        == 3
    )


def test_bad_arguments_are_refused(world):
    with pytest.raises(ValueError, match="28,56,84"):
        build_vision_tower(
            arguments(world.towers["clip"], s2=True, s2_scales="336,672")
        )
    with pytest.raises(ValueError, match="cannot be split over devices"):
        device_of_map({"vision_tower": 0, "lm_head": 1})


@pytest.mark.parametrize("unfrozen", [False, True])
def test_gradient_only_when_unfrozen(world, unfrozen):
    tower = build_vision_tower(
        arguments(world.towers["clip"], unfreeze_mm_vision_tower=unfrozen)
    )
    features = tower(pixels())
    assert features.requires_grad == unfrozen
    if unfrozen:
        features.sum().backward()
        layers = tower.vision_tower.vision_model.encoder.layers
        assert all(parameter.grad is not None for parameter in layers.parameters())
        with torch.no_grad():
            assert not tower(pixels()).requires_grad


def test_unfrozen_tower_exists_before_the_checkpoint_is_read(world):
    tower = build_vision_tower(
        arguments(world.towers["clip"], unfreeze_mm_vision_tower=True), delay_load=True
    )
    assert tower.is_loaded
    assert all(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("count, size", [(1, 56), (2, 84)])
def test_s2_is_the_tower_at_every_scale(world, backbone, count, size):
    """Against a plain loop over tiles: the same numbers up to the rounding of batched matrix
    products."""
    args = arguments(world.towers[backbone], s2=True, s2_scales="56,28")
    tower = build_vision_tower(args)
    single = build_vision_tower(arguments(world.towers[backbone]))
    assert isinstance(tower, MultiscaleVisionTower)
    assert tower.hidden_size == 64
    assert tower.num_patches == 4
    images = pixels(count, size)
    features = tower(images)
    assert features.shape == (count, 4, 64)
    small = torch.nn.functional.interpolate(images, size=(28, 28), mode="bicubic")
    large = torch.nn.functional.interpolate(images, size=(56, 56), mode="bicubic")
    coarse = single(small)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tile = single(
            large[:, :, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        )
        # A tile of 2 x 2 patches is averaged into the one patch of the coarse grid that it covers.
        expected = torch.cat([coarse[:, 2 * row + column], tile.mean(dim=1)], dim=-1)
        torch.testing.assert_close(
            features[:, 2 * row + column], expected, rtol=1e-5, atol=1e-5
        )
    assert tower.image_processor.crop_size == {"height": 56, "width": 56}
    assert (
        tower.image_processor(Image.new("RGB", (9, 9)), return_tensors="pt")[
            "pixel_values"
        ].shape[-1]
        == 56
    )
    assert [of_image.shape for of_image in tower(list(images))] == [(1, 4, 64)] * count


def test_a_projector_without_a_record_of_its_tower(world, home, tmp_path, capsys):
    projector = tmp_path / "mm_projector.bin"
    shutil.copy(world.projector(), projector)
    arguments = SimpleNamespace(
        vision_tower=f"llm2clip:{world.towers['clip']}",
        pretrain_mm_mlp_adapter=str(projector),
        mm_vision_select_layer=-2,
    )
    build_vision_tower(arguments, delay_load=True)
    note = f"note: no config.json next to {projector} records the vision tower"
    assert note in capsys.readouterr().out
    card = TowerCard.read(world.towers["clip"] / TowerCard.FILE)
    record = {"mm_vision_tower": "llm2clip"}
    record[KEY] = {"weights_sha256": card.weights_sha256}
    (tmp_path / "config.json").write_text(json.dumps(record))
    build_vision_tower(arguments, delay_load=True)
    assert "note:" not in capsys.readouterr().out
