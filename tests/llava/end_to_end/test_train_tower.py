"""Stage 2 in LLaVA's environment: old transformers, no tyro, no rich, a recent DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):  # what LLaVA does not pin itself, whatever is installed here
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "rich", "webdataset"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("tyro", "rich") else real(name, package)
from dataclasses import replace
from pathlib import Path
import tiny_data
from llm2clip_plugin.cli import run
from llm2clip_plugin.stages.tower.recipes import recipe
from llm2clip_plugin.stages.tower.run import train_tower

folder = Path(sys.argv[1])
tiny_data.make_all(folder)
assert run("train-tower", ["--recipe", "quickstart"]) == 2
config = recipe("quickstart")
config = replace(
    config,
    output_dir=str(folder / "run"),
    deepspeed="scripts/zero2.json",
    data=replace(config.data, path=(str(folder / "data"),), validation=str(folder / "data")),
    tower=replace(config.tower, path=str(folder / "tower"), image_size=16),
    heads=replace(config.heads, steps=2, batch=16),
    train=replace(config.train, global_batch=16, micro_batch=8, max_steps=3),
    evaluation=replace(config.evaluation, group=""),
)
print("tower:", train_tower(config))
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed >= 0.16 beside LLaVA")
def test_a_tower_trains_here_too(tmp_path: Path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'run `pip install tyro`, or `pip install "llm2clip-plugin[train]"` for all of' in done.stderr  # the command
    assert done.stdout.endswith(f"tower: {tmp_path / 'run' / 'tower'}\n")
    assert "train: 3/3 steps" in done.stderr and ", loss " in done.stderr and "R@1" in done.stderr
    from llm2clip_plugin import load_tower

    assert load_tower(tmp_path / "run" / "tower").config.hidden_size == 32
