"""docs/vlm.md's script for nanoVLM, with stand-ins for nanoVLM's modules."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from serve_checkpoints import tower_directory
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "vlm.md"
MEAN = [0.48, 0.45, 0.4]
STD = [0.26, 0.25, 0.27]


def script() -> str:
    section = PAGE.read_text(encoding="utf-8").partition("\n## nanoVLM\n")[2]
    match = re.search(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert match is not None
    return match[1]


def test_nanovlms_convolution_normalizes_as_the_towers_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's first convolution of pixels of 0 to 1 is that of normalized pixels; its grid
    decides the number of tokens; its files are found in its folder."""
    tower = tower_directory("siglip")
    folder = tmp_path / "towers" / "tuned"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(tower / name)
    described = json.loads((tower / "preprocessor_config.json").read_text())
    described |= {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 4, stride=4)
    pixels = torch.rand(2, 3, 8, 8)
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    expected = conv((pixels - mean) / std)

    loaded = SimpleNamespace(patch_embedding=SimpleNamespace(conv=conv))
    vit: Any = SimpleNamespace(from_pretrained=lambda _: loaded)
    modules: dict[str, dict[str, Any]] = {
        "train": {"config": SimpleNamespace(VLMConfig=dict), "main": None},
        "models": {},
        "models.vision_transformer": {"ViT": vit},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    # restored, as the script replaces it
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", huggingface_hub.hf_hub_download
    )
    monkeypatch.chdir(tmp_path)
    exec(script(), {"__name__": "train_tower"})

    assert vit.from_pretrained(None) is loaded
    torch.testing.assert_close(conv(pixels), expected, atol=1e-5, rtol=1e-5)
    settings = sys.modules["train"].config.VLMConfig()
    assert settings["vit_img_size"] == 32
    assert settings["mp_image_token_length"] == 1  # 4 x 4 patches
    found = huggingface_hub.hf_hub_download("towers/tuned", "model.safetensors")
    assert Path(found).is_file()
