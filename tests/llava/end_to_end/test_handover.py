"""From the training environment to LLaVA's: a tower trained and exported by transformers 5 gives
the same features in 4.37, and LLaVA's stages run on it.

The training environment's Python is ``.venv/bin/python``, as scripts/test.sh makes it, or
LLM2CLIP_TRAIN_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llava.model.multimodal_encoder.builder import build_vision_tower
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
TRAIN_PYTHON = Path(
    os.environ.get("LLM2CLIP_TRAIN_PYTHON", ROOT / ".venv" / "bin" / "python")
)
BACKBONES = ("clip", "siglip", "dinov2", "eva02")

# Runs in the training environment: towers trained for twenty steps against made-up embeddings.
EXPORT = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers import SiglipVisionConfig, SiglipVisionModel
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder
from vision.conftest import train_twenty_steps
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.export import export_tower
common = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
common |= dict(image_size=42, patch_size=14)
clip = dict(intermediate_size=64, hidden_act="quick_gelu")
eva02 = dict(intermediate_size=85, rope_pretrained_grid=2)
makers = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**clip, **common)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=64, **common)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **common)),
    "eva02": lambda: Eva02VisionModel(Eva02Config(**eva02, **common)),
}
pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
for seed, (name, make) in enumerate(makers.items()):
    torch.manual_seed(seed)
    tower = make()
    dual = DualEncoder(tower, DualConfig(projection_dim=16, llm_width=12)).train()
    losses = train_twenty_steps(dual)
    assert losses[-1] < 0.5 * losses[0], (name, losses)
    folder = Path(sys.argv[1]) / name
    export_tower(dual.eval(), folder, origin="made for tests")
    with torch.no_grad():
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    tensors = {str(layer): state.contiguous() for layer, state in enumerate(states)}
    save_file(tensors, Path(sys.argv[1]) / f"{name}.safetensors")
import transformers
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    if not TRAIN_PYTHON.exists():
        pytest.skip(
            f"no training environment at {TRAIN_PYTHON}; scripts/test.sh makes it"
        )
    folder = tmp_path_factory.mktemp("exported")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [str(TRAIN_PYTHON), "-c", EXPORT, str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.strip().splitlines()[-1].split(".")[0]) >= 5
    return folder


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("layer", [0, -2, -1])
def test_same_hidden_states(exported, home, backbone, layer):
    args = SimpleNamespace(
        vision_tower=str(exported / backbone),
        mm_vision_select_layer=layer,
        mm_vision_select_feature="cls_patch",
    )
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    there = load_file(exported / f"{backbone}.safetensors")
    expected = there[str(layer % len(there))]
    # Two versions of the attention kernels in float32: measured differences stay below 2e-6.
    torch.testing.assert_close(
        build_vision_tower(args)(pixels), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "backbone", ["siglip", "dinov2", "eva02"]
)  # test_stages has CLIP
def test_pretrain_and_finetune_run_on_it(exported, world, tmp_path, backbone):
    tower = f"llm2clip:{exported / backbone}"
    pretrained = tmp_path / "llava-pre"
    finetuned = tmp_path / "llava-fine"
    more = ("--pretrain_mm_mlp_adapter", str(pretrained / "mm_projector.bin"))
    losses = [
        world.stage("pretrain", tower, pretrained),
        world.stage("finetune", tower, finetuned, *more),
    ]
    assert [len(values) for values in losses] == [3, 3]
    assert all(0 < value < 20 for values in losses for value in values)
    assert (
        json.loads((finetuned / "config.json").read_text())["llm2clip_tower"]["family"]
        == backbone
    )
