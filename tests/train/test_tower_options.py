"""A tower that goes on with its own heads, and one that trains by LoRA."""

import dataclasses
import math

import pytest
import torch
from tiny_clip import save_tiny_clip
from tiny_data import make_tower
from train_helpers import trainable_names

from llm2clip_plugin.train.config import OptimConfig, TowerConfig
from llm2clip_plugin.train.model import build_dual, trained_parameters
from llm2clip_plugin.vision import DualConfig
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.dual import heads_state
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import tower_blocks

DUAL = DualConfig(projection_dim=8, llm_width=24, pool="mean")


@pytest.fixture
def tower(tmp_path):
    return str(make_tower(tmp_path / "tower"))


def test_keep_heads_trains_the_heads_of_the_directory(tower, tmp_path):
    first = build_dual(TowerConfig(path=tower), DUAL, seed=1)
    export_tower(first, tmp_path / "trained", origin="x")
    again = build_dual(TowerConfig(path=str(tmp_path / "trained"), keep_heads=True), DUAL, seed=2)
    fresh = build_dual(TowerConfig(path=str(tmp_path / "trained")), DUAL, seed=2)
    kept = heads_state(first)
    assert all(torch.equal(value, kept[name]) for name, value in heads_state(again).items())
    assert not torch.equal(fresh.visual_projection.weight, first.visual_projection.weight)
    narrow = dataclasses.replace(DUAL, projection_dim=6)
    with pytest.raises(ValueError, match="projection_dim 8"):
        build_dual(TowerConfig(path=str(tmp_path / "trained"), keep_heads=True), narrow, seed=2)


def test_lora_trains_low_rank_updates_and_the_heads(tower):
    model = build_dual(TowerConfig(path=tower, lora_rank=4), DUAL, seed=1)
    names = trainable_names(model)
    assert any(".lora_B." in name for name in names)
    assert all(".lora_" in name for name in names if name.startswith("tower."))
    assert {name.split(".")[0] for name in names} == {"tower", "visual_projection", "text_adapter", "logit_scale"}
    rates = {trained.name: trained.lr for trained in trained_parameters(model, OptimConfig(lr=1.0, layer_decay=0.5))}
    blocks = len(tower_blocks(model.tower))
    assert {rate for name, rate in rates.items() if ".lora_" in name} == {0.5**depth for depth in range(1, blocks + 1)}
    with pytest.raises(ValueError, match="lora_rank"):
        TowerConfig(path=tower, lora_rank=4, freeze=True)


def first_scale(tower: TowerConfig, dual: DualConfig = DUAL) -> float:
    return build_dual(tower, dual, seed=1).logit_scale.item()


@pytest.mark.parametrize("source", ["whole", "sharded", "siglip", "imported", "trained"])
def test_the_pretrained_logit_scale_stays(source, tmp_path):
    """As in the authors' code, whichever file it is in; a set value takes precedence."""
    model, path = save_tiny_clip(tmp_path / "clip", "siglip" if source == "siglip" else "clip"), tmp_path / "clip"
    model.logit_scale.data.fill_(4.25)
    model.save_pretrained(path, max_shard_size="20KB" if source == "sharded" else "1GB")
    if source == "sharded":
        (path / "model.safetensors").unlink()
    if source == "imported":
        card, _ = import_tower(path, path := tmp_path / "tower")
        assert card.dual["logit_scale_init"] == 4.25
    if source == "trained":
        dual = build_dual(TowerConfig(path=str(path)), DUAL, seed=1)
        export_tower(dual, path := tmp_path / "tower", origin="x")
    tower = TowerConfig(path=str(path))
    assert first_scale(tower) == 4.25
    assert first_scale(tower, dataclasses.replace(DUAL, logit_scale_init=3.0)) == 3.0
    resized = dataclasses.replace(tower, image_size=24)
    assert first_scale(resized) == 4.25
    scratch = TowerConfig(architecture=str(path), from_scratch=True)
    assert first_scale(scratch) == pytest.approx(math.log(1 / 0.07))
