"""Stage 2 in LLaVA's environment: old transformers, no rich, a recent DeepSpeed."""

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
        if name.split(".")[0] in ("rich", "webdataset"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "rich" else real(name, package)
from pathlib import Path
import tiny_data
from llm2clip_plugin.cli import run

folder = Path(sys.argv[1])
tiny_data.make_all(folder)
words = f"{folder}/data --recipe quickstart --tower {folder}/tower --image-size 16 --output {folder}/run"
words += f" --validation {folder}/data --evaluation.group= --deepspeed scripts/zero2.json --heads.steps 2"
words += " --heads.batch-size 16 --global-batch 16 --micro-batch 8 --max-steps 3"
assert run("train-tower", words.split()) == 0
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed >= 0.16 beside LLaVA")
def test_a_tower_trains_here_too(tmp_path: Path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith(f"tower: {tmp_path / 'run' / 'tower'}\n")
    assert "train: 3/3 steps" in done.stderr and ", loss " in done.stderr and "R@1" in done.stderr
    from llm2clip_plugin import load_tower

    assert load_tower(tmp_path / "run" / "tower").config.hidden_size == 32
