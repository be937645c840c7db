"""LoRA on a tower: starts as the tower, trains alone, is merged on export."""

import pytest
import torch

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.eva02 import Eva02VisionModel
from llm2clip_plugin.vision.export import export_tower, probe_features
from llm2clip_plugin.vision.lora import add_lora, merged
from llm2clip_plugin.vision.parts import tower_blocks
from llm2clip_plugin.vision.towers import load_tower

from .conftest import TRANSFORMERS_TOWERS
from .test_eva02 import tiny_config

pytest.importorskip("peft", reason="PEFT is of the training environment")


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "dinov2", "eva02"])
def test_trains_alone_and_is_merged_on_export(name, tmp_path):
    tower = (
        Eva02VisionModel(tiny_config())
        if name == "eva02"
        else load_tower(TRANSFORMERS_TOWERS / name)
    )
    dual = DualEncoder(tower, DualConfig(projection_dim=8, llm_width=12)).eval()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    features = probe_features(dual)
    add_lora(tower, rank=4, alpha=8)
    assert not tower.training
    assert not any(module.training for module in tower.modules())
    again = probe_features(dual)
    assert all(torch.allclose(again[key], features[key], atol=1e-6) for key in features)
    trainable = [key for key, p in tower.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_" in key for key in trainable)
    optimizer = torch.optim.AdamW(
        [p for p in dual.parameters() if p.requires_grad], lr=1e-2
    )
    size = tower.config.image_size
    for _ in range(3):
        image, text, *_ = dual(torch.randn(4, 3, size, size), torch.randn(4, 12))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            dual.scale * image @ text.T, torch.arange(4)
        ).backward()
        optimizer.step()
    trained = probe_features(dual)
    assert not torch.allclose(
        trained["pooler_output"], features["pooler_output"], atol=1e-4
    )
    export_tower(dual, tmp_path / "tower", origin="x")
    # the model itself may go on training
    assert any(".lora_A." in name for name, _ in dual.named_parameters())
    reloaded = probe_features(load_dual_encoder(tmp_path / "tower").dual)
    assert all(
        torch.allclose(reloaded[key], trained[key], atol=2e-5) for key in trained
    )
    after = load_tower(tmp_path / "tower").state_dict()
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert all(
        key.endswith(".weight") and "norm" not in key and "embeddings" not in key
        for key in changed
    )
    assert len(tower_blocks(merged(tower))) == len(tower_blocks(tower))
