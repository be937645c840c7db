"""LLaVA's own programs train and answer with a DINOv3 and a timm tower (Perception Encoder), on today's libraries."""

import json
from pathlib import Path

import pytest
from llava_world import losses

from llava_integration.compat.runner import installed_version
from llm2clip_plugin.console import numbers
from llm2clip_plugin.vision.convert.importing import import_tower

pytestmark = [
    pytest.mark.both_stacks,
    pytest.mark.skipif(numbers(installed_version("transformers")) < (5,), reason="LLaVA's own libraries lack them"),
]
GOLDEN = Path(__file__).parents[2] / "golden" / "towers_of_today"
EYES = ("dinov3", "pe_core")
# Both stages and an answer of every tower in one process, because each start takes many seconds
TRAIN_AND_ANSWER = """
import json, sys, torch
from PIL import Image
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.train.train import train
runs, folders, image = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Image.open(sys.argv[3]).convert("RGB")
for argv in runs:
    sys.argv = ["train.py", *argv]
    train()
for folder in folders:
    tokenizer, model, processor, _ = load_pretrained_model(folder, None, get_model_name_from_path(folder))
    ids = tokenizer_image_token("<image>\\nWhich colour?", tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config).to(model.dtype)
    output = model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=4)
    tower = model.get_vision_tower()
    print("ANSWER", json.dumps([type(tower).__name__, tower.num_patches, tower.hidden_size, output.shape[1]]))
"""


def test_llava_trains_and_answers_with_towers_that_its_pins_cannot_run(world):
    runs, folders = [], []
    for name in EYES:
        tower, folder = world.root / "eyes" / name, world.root / f"llava-{name}"
        import_tower(GOLDEN / name, tower)
        projector = world.root / f"llava-{name}-pretrain"
        for kind, output in (("pretrain", projector), ("finetune", folder)):
            runs.append([*world.stage_options(kind, f"llm2clip:{tower}", output), "--use_cpu", "True"])
            folders.append(output)
        runs[-1] += ["--pretrain_mm_mlp_adapter", str(projector / "mm_projector.bin")]
    models, image = [str(world.root / f"llava-{name}") for name in EYES], next(world.images.glob("red-*.png"))
    told = world.forked("-c", TRAIN_AND_ANSWER, json.dumps(runs), json.dumps(models), image)
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in told.splitlines() if line.startswith("ANSWER ")]
    assert [answer[:3] for answer in answers] == [["LLM2CLIPVisionTower", 16, 16]] * 2
    assert all(1 <= tokens <= 5 for *_, tokens in answers), answers  # <s> and at most four
    for folder in folders:
        assert len(losses(folder)) == 3 and all(0 < loss < 20 for loss in losses(folder))
    for name in EYES:
        config = json.loads((world.root / f"llava-{name}" / "config.json").read_text())
        assert config["llm2clip_tower"]["family"] == {"dinov3": "dinov3", "pe_core": "timm"}[name]
        assert config["mm_hidden_size"] == 16
