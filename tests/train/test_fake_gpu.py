"""No CPU tensor on the way of a step on a GPU: every step on fake CUDA tensors, on a machine without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
RUNS = [
    *("tower", "tower cached", "tower sigmoid", "tower sigmoid cached", "tower bf16"),
    *("tower siglip", "tower dinov2", "tower eva02-b16"),
    *("stage 1", "stage 1 hard negatives", "stage 1 cached", "stage 1 without masks", "embed", "evaluation", "heads"),
]
# the library must be loaded before torch, which asks only once whether there is a GPU
START = "import ctypes, runpy, sys; ctypes.CDLL({library!r}); runpy.run_path({script!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this build of torch knows real GPUs: the tests marked gpu run there")
    if not (compiler := shutil.which("g++")):
        pytest.skip("a device guard has to be compiled, and there is no g++")
    folder = tmp_path_factory.mktemp("fake_gpu")
    library, base = folder / "fake_gpu.so", Path(torch.__file__).parent
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{base}/include", f"-L{base}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(
        [compiler, str(HERE / "fake_gpu.cpp"), "-o", library, *options, f"-Wl,-rpath,{base}/lib"], check=True
    )
    start = START.format(library=str(library), script=str(HERE / "fake_gpu_steps.py"))
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", start, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcome.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_step_on_a_gpu(outcome: dict[str, str], name: str) -> None:
    assert not outcome[name], outcome[name]


def test_every_run_is_looked_at_and_a_cpu_tensor_is_an_error(outcome: dict[str, str]) -> None:
    assert set(outcome) == {*RUNS, "stray"}
    assert "at least two devices, cuda:0 and cpu" in outcome["stray"]
