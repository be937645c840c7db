"""Qwen2.5-VL's tower of square images: the states of transformers' own, patch by patch."""

import json

import pytest
import torch
import transformers

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.convert.importing import main as import_main
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.parts import tower_blocks, tower_embeddings_parameters
from llm2clip_plugin.vision.qwen25 import Qwen25VisionConfig, Qwen25VisionModel
from scripts.towers_references import qwen25_states

from .conftest import largest_difference, train_twenty_steps

TOLERANCE = 2e-6  # float32, summed in another order
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "patch_size": 7, "window_size": 28}
VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
VISION |= {"patch_size": 7, "window_size": 28, "fullatt_block_indexes": [1]}
VISION |= {"out_hidden_size": 16}
needs_qwen = pytest.mark.skipif(
    not hasattr(transformers, "Qwen2_5_VLModel"),
    reason="this transformers has no Qwen2.5-VL",
)


def tiny(size: int = 56) -> Qwen25VisionModel:
    """Random weights; windows of 4 x 4 patches."""
    config = Qwen25VisionConfig(**SIZES, image_size=size, full_attention_blocks=[1])
    return Qwen25VisionModel(config).eval()


@pytest.fixture
def original(tmp_path):
    """A random Qwen2.5-VL of transformers in tmp_path / "vlm"; its vision model."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=VISION, text_config={**text, "rope_parameters": rope}
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "vlm")
    return model.model.visual


@needs_qwen
@pytest.mark.parametrize("size", [56, 70, 42])
def test_states_are_transformers(original, tmp_path, size):
    """Whole windows of 4 x 4 patches, and grids of 10 and 6 that end in parts of windows."""
    card, report = import_tower(tmp_path / "vlm", tmp_path / "tower", image_size=size)
    assert (card.family, card.has_cls) == ("qwen25", False)
    assert card.num_patches == (size // 7) ** 2
    assert any("merger" in line or "projector" in line for line in report)
    pixels = torch.randn(2, 3, size, size)
    expected = qwen25_states(original, pixels)
    for attention in ("sdpa", "eager"):
        tower = load_tower(tmp_path / "tower")
        tower.set_attn_implementation(attention)
        with torch.no_grad():
            output = tower(pixels, output_hidden_states=True)
        assert len(output.hidden_states) == 4 == len(expected)
        for state, other in zip(output.hidden_states, expected, strict=True):
            assert largest_difference(state, other) < TOLERANCE
        assert torch.equal(output.pooler_output, output.last_hidden_state.mean(1))


@needs_qwen
def test_part_vision_reads_the_same_tower(original, tmp_path):
    whole, _ = import_tower(tmp_path / "vlm", tmp_path / "whole")
    card, report = import_tower(tmp_path / "vlm", tmp_path / "part", part="vision")
    assert card.weights_sha256 == whole.weights_sha256
    assert report[0].startswith("vision part of a qwen2_5_vl: ")
    with pytest.raises(ValueError, match="run `llm2clip import"):
        load_tower(tmp_path / "vlm")
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    del config["vision_config"]["fullatt_block_indexes"]
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs fullatt_block_indexes in vision_conf"):
        import_tower(tmp_path / "vlm", tmp_path / "other")


@needs_qwen
def test_another_size_interpolates_no_positions(original, tmp_path, capsys):
    arguments = [str(tmp_path / "vlm"), "--output", str(tmp_path / "tower")]
    assert import_main([*arguments, "--part", "vision", "--image-size", "70"]) == 0
    report = capsys.readouterr().out
    assert "interpolated" not in report
    assert "image size changed from 448 to 70 px; there is no position table" in report


# field -> bad values, and the message
BAD_FIELDS = [
    ("num_heads", "2", r"\(num_heads in .* is '2', expected a whole number above 0"),
    ("num_heads", 0, r"\(num_heads in .* is 0, expected a whole number above 0"),
    ("window_size", 5, "window_size 5 is below patch_size 7"),
    ("window_size", 28.5, "window_size is 28.5, expected a whole number"),
    (
        "fullatt_block_indexes",
        1,
        r"\(fullatt_block_indexes in .* is 1, expected a list",
    ),
]


@needs_qwen
@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_bad_fields_of_its_config_are_named(field, value, message, original, tmp_path):
    file = tmp_path / "vlm" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"][field] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_tower(tmp_path / "vlm", tmp_path / "tower", part="vision")


def test_trains_is_exported_and_comes_back(tmp_path):
    tower = tiny()
    tower.gradient_checkpointing_enable()
    placed = [*tower_embeddings_parameters(tower), *tower_blocks(tower).parameters()]
    assert {id(one) for one in placed} == {id(one) for one in tower.parameters()}
    dual = DualEncoder(tower, DualConfig(projection_dim=8, llm_width=12)).train()
    losses = train_twenty_steps(dual)
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in placed)
    export_tower(dual, tmp_path / "tower", origin="tiny")
    assert TowerCard.read(tmp_path / "tower" / TowerCard.FILE).num_patches == 64
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = dual.eval().encode_image(pixels)
        actual = load_dual_encoder(tmp_path / "tower").encode_image(pixels)
    assert largest_difference(actual, expected) < TOLERANCE


def test_windows_keep_patches_apart():
    """A pixel reaches its own window alone, until a block attends to all patches."""
    tower = tiny()
    pixels = torch.randn(1, 3, 56, 56)
    changed = pixels.clone()
    changed[..., -1, -1] += 1  # in the last window
    with torch.no_grad():
        before = tower(pixels, output_hidden_states=True).hidden_states
        after = tower(changed, output_hidden_states=True).hidden_states
    is_moved = [
        (a != b).any(-1)[0].view(8, 8) for a, b in zip(before, after, strict=True)
    ]
    assert is_moved[0].sum() == 1
    assert is_moved[1][4:, 4:].all()
    assert is_moved[1].sum() == 16
    assert is_moved[2].all()


def test_a_size_that_the_merger_cannot_take_is_refused():
    with pytest.raises(
        ValueError, match=r"image_size 63 is not a multiple of 14: Qwen2\.5"
    ):
        tiny(63)
    with pytest.raises(ValueError, match="head width, must be a multiple of 4"):
        Qwen25VisionConfig(hidden_size=30, num_attention_heads=2)
