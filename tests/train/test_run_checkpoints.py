"""A run's checkpoints: their files, going back, and one run at a time in a folder."""

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from train_helpers import Averages, Engineless, new_state, save_now

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.run_folder import LOCK
from llm2clip_plugin.train.checkpoint import (
    AVERAGES,
    Checkpoints,
    TensorFile,
    verify,
    write_tensors,
)
from llm2clip_plugin.train.guard import acquire, locked


def saved(run: Path, *steps: int, keep: int = 0) -> Checkpoints:
    """A run folder with checkpoints of these steps."""
    for step in steps:
        save_now(run, new_state(step), Engineless(), {AVERAGES: Averages()}, keep)
    return Checkpoints(run, keep=keep)


def test_tensors_are_safetensors_and_return_without_a_map(tmp_path: Path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4),
    }
    tensors |= {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "strided": torch.randn(4, 6).T,
    }
    tensors["count"] = torch.tensor([1 << 40])
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    values = dict(TensorFile(path))
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert not any(file.path == str(path) for file in psutil.Process().open_files())
    for name, value in load_file(path).items():
        assert torch.equal(value, tensors[name]), name
        assert torch.equal(values[name], tensors[name]), name
    assert values.keys() == tensors.keys()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights": lambda path: flip(path / "model.safetensors"),
    "moments": lambda path: flip(path / "optimizer.safetensors"),
    "averages": lambda path: flip(path / "ema.safetensors"),
    "a cut state.json": lambda path: (path / "state.json").write_text(
        '{"kind": "llm2clip-tr'
    ),
    "no state.json": lambda path: (path / "state.json").unlink(),
    "a cut model": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:9]
    ),
    "no averages": lambda path: (path / "ema.safetensors").unlink(),
    "a header without end": lambda path: (path / "model.safetensors").write_bytes(
        b"\xff" * 64
    ),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    checkpoints = saved(tmp_path, 1, 2)
    DAMAGE[name](checkpoints.path(2))
    assert (
        checkpoints.find("auto")
        == checkpoints.find(str(tmp_path))
        == checkpoints.path(1)
    )
    message = capsys.readouterr().err
    assert name == "gone" or (
        "step-00000002" in message
        and f"falling back to {checkpoints.path(1)}" in message
    )
    assert checkpoints.find("auto", moments=False) == checkpoints.path(
        2 if "moments" in name else 1
    )
    if name == "gone":
        return
    with pytest.raises((ContractError, FileNotFoundError), match="step-00000002"):
        checkpoints.find(str(checkpoints.path(2)))
    DAMAGE[name](checkpoints.path(1))
    with pytest.raises(ContractError, match="step-00000002"):
        checkpoints.find("auto")


def test_going_back_moves_newer_checkpoints_aside_and_removes_none(tmp_path: Path):
    checkpoints = saved(tmp_path / "run", 1, 2, 3)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 3}\n')
    assert "step-00000002, step-00000003" in checkpoints.move_aside(checkpoints.path(1))
    (aside,) = checkpoints.folder.glob("abandoned-*")
    assert sorted(path.name for path in aside.iterdir()) == [
        "metrics.jsonl",
        "step-00000002",
        "step-00000003",
    ]
    assert checkpoints.find("auto") == checkpoints.path(1)
    assert checkpoints.move_aside(checkpoints.path(1)) == ""
    saved(tmp_path / "run", 2, 3, 4, keep=1)
    assert checkpoints.names() == ["step-00000004"]
    verify(aside / "step-00000003")
    other = saved(tmp_path / "other", 9)  # another run's steps are not mixed with these
    assert "step-00000004" in checkpoints.move_aside(other.path(9))
    assert checkpoints.names() == []
    assert len(list(checkpoints.folder.glob("abandoned-*/step-*"))) == 3


HOLD = """
import sys
from collections.abc import Callable
from pathlib import Path
from llm2clip_plugin.train.guard import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_is_not(tmp_path: Path):
    run = tmp_path / "run"
    pipe = subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=pipe, stdout=pipe, text=True
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match=f"process {holder.pid} "):
            acquire(run)
    finally:
        holder.kill()
        holder.communicate()
    assert (run / LOCK).is_file()
    with locked(run):
        assert json.loads((run / LOCK).read_text())["pid"] == psutil.Process().pid
    assert not (run / LOCK).exists()
