"""LIFT's recipe really trains: a tower that begins with random weights learns from the cache, in a few steps."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_data import WIDTH, make_all
from tower_runs import lines, losses

from llm2clip_plugin.cli import run
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.dual import load_dual

STEPS = 12


def test_lift_trains_a_tower_from_random_weights(tmp_path: Path):
    tiny, output = make_all(tmp_path), tmp_path / "run"
    words = [str(tiny / "data"), "--recipe", "lift_b16", "--tower.architecture", str(tiny / "tower"), "--seed", "3"]
    words += ["--validation", str(tiny / "data"), "--output", str(output), "--precision", "fp32", "--workers", "0"]
    words += ["--global-batch", "16", "--max-steps", str(STEPS), "--lr", "1e-2", "--warmup-steps", "2"]
    assert run("train-tower", words) == 0
    values = losses(output)
    assert sorted(values) == list(range(1, STEPS + 1)) and values[STEPS] < 0.9 * values[1]
    scores = [line for line in lines(output) if "i2t_r1" in line]
    assert len(scores) == 1 and scores[0]["step"] == STEPS  # a random tower has no before
    card = TowerCard.read(output / "tower" / TowerCard.FILE)
    assert card.training["recipe"] == "lift_b16" and card.training["steps"] == STEPS
    dual, _ = load_dual(output / "tower")
    captions = torch.randn(2, WIDTH)
    fixed = torch.nn.functional.normalize(captions, dim=-1)
    assert torch.allclose(dual.encode_text(captions), fixed, atol=1e-6)
