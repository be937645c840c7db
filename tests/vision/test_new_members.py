"""A family of towers takes one file, docs/extending.md's, used here from another folder, end to
end."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm2clip_plugin import load_tower
from llm2clip_plugin.vision import families
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.towers import new_tower

EXTENDING = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(
    encoding="utf-8"
)
FAMILY = re.search(r'```python\n("""Chinese-CLIP .*?)```', EXTENDING, re.DOTALL)[1]
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGES = {"image_size": 28, "patch_size": 7}


@pytest.fixture
def released(monkeypatch, tmp_path) -> Path:
    """A Chinese-CLIP image-text model, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "chinese_clip.py").write_text(FAMILY)
    monkeypatch.setattr(
        families, "__path__", [*families.__path__, str(tmp_path / "families")]
    )
    text = {**SIZE, "vocab_size": 40}
    config = transformers.ChineseCLIPConfig(
        text_config=text, vision_config={**SIZE, **IMAGES}, projection_dim=20
    )
    model = transformers.ChineseCLIPModel(config).eval()
    model.save_pretrained(tmp_path / "released", safe_serialization=True)
    return tmp_path / "released"


def test_a_new_family_is_planned_and_runs_in_llava(released, tmp_path):
    assert (
        new_tower(
            "OFA-Sys/chinese-clip-vit-base-patch16", image_size=336, device="meta"
        ).config.image_size
        == 336
    )
    from llava_integration.plug.tower import LLM2CLIPVisionTower
    from llava_integration.plug.towers import locate

    card, _ = import_tower(released, tmp_path / "tower")
    args = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = LLM2CLIPVisionTower(
        "llm2clip", locate(f"llm2clip:{tmp_path / 'tower'}"), args, delay_load=True
    )
    assert tower.hidden_size == 32
    assert tower.num_patches == card.num_patches
    assert tower.is_loaded is False
    tower.load_model()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = load_tower(tmp_path / "tower")(
            pixel_values=pixels, output_hidden_states=True
        ).hidden_states
    assert torch.equal(tower(pixels), states[-2][:, 1:])
    assert tower.image_processor.crop_size == {"height": 28, "width": 28}
