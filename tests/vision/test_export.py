"""Tower directories: written atomically, verified by reloading, the Hub's names in both versions of
transformers."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_data import made_up

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_weights
from llm2clip_plugin.vision import export
from llm2clip_plugin.vision.directory import DualConfig, check_card
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.export import compare_features, export_tower, probe_features
from llm2clip_plugin.vision.towers import load_tower

from .conftest import TOWERS_ALONE, TRANSFORMERS_TOWERS, read


def tiny_dual(name: str = "clip_vision", image_size: int | None = None) -> DualEncoder:
    tower = load_tower(TRANSFORMERS_TOWERS / name, image_size=image_size)
    return DualEncoder(
        tower,
        DualConfig(
            projection_dim=8, llm_width=12, projection_norm=True, logit_bias_init=-10.0
        ),
    )


@pytest.mark.parametrize("name", TOWERS_ALONE)
def test_resized_towers_carry_the_same_names(name, tmp_path):
    patch = json.loads((TRANSFORMERS_TOWERS / name / "config.json").read_text())[
        "patch_size"
    ]
    card = export_tower(
        load_tower(TRANSFORMERS_TOWERS / name, image_size=patch * 6),
        tmp_path / "tower",
        origin=name,
    )
    written = load_file(tmp_path / "tower" / "model.safetensors")
    assert (
        written.keys() == read(TRANSFORMERS_TOWERS / name, "model.safetensors").keys()
    )
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert config["image_size"] == card.image_size == patch * 6
    assert card.training["resized_from"] == config["resized_from"] != patch * 6


def test_a_clip_tower_opens_with_plain_transformers(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionModel

    dual = tiny_dual(image_size=42).eval()
    export_tower(dual, tmp_path / "tower", origin="x")
    plain = CLIPVisionModel.from_pretrained(
        tmp_path / "tower", torch_dtype=torch.float32
    )
    pixels = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        assert torch.equal(
            plain(pixel_values=pixels).pooler_output,
            dual.tower(pixel_values=pixels).pooler_output,
        )
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "tower")
    assert processor.crop_size == {"height": 42, "width": 42}
    assert processor.size == {"shortest_edge": 42}


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "dinov2"])
def test_dual_encoder_comes_back(name, tmp_path):
    dual = tiny_dual(name).eval()
    dual.logit_scale.data.fill_(math.log(20))
    recorded = {
        "teacher": dataclasses.asdict(made_up("some/llm")),
        "training": {"steps": 3},
        "metrics": {"i2t_r1": 0.5},
    }
    card = export_tower(dual, tmp_path / "tower", origin="a/b", **recorded)
    assert card == TowerCard.read(tmp_path / "tower" / "llm2clip.json")
    layers = len(probe_features(dual.tower)) - 3
    assert card.num_layers == layers
    assert card.projection_dim == 8
    assert card.teacher["llm"] == "some/llm"
    loaded = load_dual_encoder(tmp_path / "tower")
    assert math.isclose(loaded.logit_scale.item(), 20, rel_tol=1e-6)
    pixels = torch.randn(2, 3, card.image_size, card.image_size)
    embeddings = torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), dual.encode_image(pixels))
        assert torch.equal(loaded.encode_text(embeddings), dual.encode_text(embeddings))
    text = (tmp_path / "tower" / "README.md").read_text()
    assert "some/llm" in text
    assert "0.5000" in text
    assert card.weights_sha256 in text


def test_export_leaves_training_mode_and_gradients_alone(tmp_path):
    dual = tiny_dual().train()
    dual.tower.eval()
    export_tower(dual, tmp_path / "tower", origin="x")
    assert dual.training
    assert not dual.tower.training
    assert dual.text_adapter.training


def test_nothing_is_written_when_the_reload_differs(tmp_path, monkeypatch):
    dual = tiny_dual()
    kept = export.save_heads

    def spoiled(model, directory):
        fields = kept(model, directory)
        state = load_file(directory / "text_adapter.safetensors")
        state["visual_projection.weight"][0, 0] += 1
        save_file(state, directory / "text_adapter.safetensors")
        return {
            **fields,
            "adapter_sha256": sha256_weights(directory / "text_adapter.safetensors"),
        }

    monkeypatch.setattr(export, "save_heads", spoiled)
    with pytest.raises(
        ContractError,
        match=r"tensors differ after reloading: .*visual_projection.weight",
    ):
        export_tower(dual, tmp_path / "tower", origin="x")
    assert list(tmp_path.iterdir()) == []


def test_features_that_differ_are_refused():
    features = probe_features(tiny_dual().eval())
    spoiled = {**features, "pooler_output": features["pooler_output"] + 1e-2}
    with pytest.raises(ContractError, match="there: pooler_output differs"):
        compare_features(features, spoiled, where="there")
    spoiled["pooler_output"] = features["pooler_output"] * float("nan")
    with pytest.raises(ContractError, match="pooler_output differs by nan"):
        compare_features(features, spoiled, where="there")


@pytest.mark.parametrize("file", ["model.safetensors", "text_adapter.safetensors"])
def test_a_flipped_byte_of_the_weights_is_refused(file, tmp_path):
    tower = tmp_path / "tower"
    export_tower(tiny_dual(), tower, origin="x", metrics={"recall": 0.25})
    load_dual(tower)
    data = bytearray((tower / file).read_bytes())
    data[-1] ^= 1
    (tower / file).write_bytes(data)
    for read_again in (load_dual, check_card):
        with pytest.raises(ContractError, match=rf"{file} has SHA-256 \w{{64}}"):
            read_again(tower)
