"""A tower that goes on with its own heads, and one that trains by LoRA."""

import pytest
import torch
from tiny_data import make_tower
from train_helpers import trainable_names

from llm2clip_plugin.train.model import TowerConfig, build_dual, trained_parameters
from llm2clip_plugin.train.optim import OptimConfig
from llm2clip_plugin.vision.dual import DualConfig, heads_state
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
    with pytest.raises(ValueError, match=r"saved with projection_dim 8 \(not 6\); set dual"):
        build_dual(
            TowerConfig(path=str(tmp_path / "trained"), keep_heads=True),
            DualConfig(projection_dim=6, llm_width=24, pool="mean"),
            seed=2,
        )
    with pytest.raises(FileNotFoundError, match="no llm2clip-tower"):
        build_dual(TowerConfig(path=tower, keep_heads=True), DUAL, seed=2)


def test_lora_trains_low_rank_updates_and_the_heads(tower):
    model = build_dual(TowerConfig(path=tower, lora_rank=4), DUAL, seed=1)
    names = trainable_names(model)
    assert any(".lora_B." in name for name in names)
    assert all(".lora_" in name for name in names if name.startswith("tower."))
    assert {name.split(".")[0] for name in names} == {"tower", "visual_projection", "text_adapter", "logit_scale"}
    rates = {trained.name: trained.lr for trained in trained_parameters(model, OptimConfig(lr=1.0, layer_decay=0.5))}
    blocks = len(tower_blocks(model.tower))
    assert {rate for name, rate in rates.items() if ".lora_" in name} == {0.5**depth for depth in range(1, blocks + 1)}
    with pytest.raises(ValueError, match=r"tower.lora_rank freezes the tower; leave tower.freeze\* unset"):
        TowerConfig(path=tower, lora_rank=4, freeze=True)
