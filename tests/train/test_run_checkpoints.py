"""Which checkpoint a run continues from: hashes, fallback, what is kept, and one run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from train_helpers import Averages, Engineless

from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.train import guard as run_lock
from llm2clip_plugin.train.checkpoint import (
    Checkpoints,
    Saver,
    TensorFile,
    TrainState,
    load,
    load_weights,
    verify,
    write_tensors,
)


def saved(run: Path, *steps: int, keep: int = 0) -> Checkpoints:
    """A run folder with checkpoints of these steps."""
    with Saver(Checkpoints(run, keep=keep), Engineless(), Averages()) as saver:
        for step in steps:
            saver.save(TrainState(step=step, samples=step, config={"a": (1, 0.1)}, config_hash="", seed=0))
            saver.finish()
    return saver.checkpoints


def test_tensors_are_safetensors_and_return_without_a_map(tmp_path: Path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "strided": torch.randn(4, 6).T,
        "count": torch.tensor([1 << 40]),
    }
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    read = TensorFile(path)
    values = dict(read)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert not any(file.path == str(path) for file in psutil.Process().open_files())
    for name, value in load_file(path).items():
        assert torch.equal(value, tensors[name]) and torch.equal(values[name], tensors[name]), name
    assert read.keys() == tensors.keys()
    save_file({"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int8)}, path, metadata={"format": "pt"})
    assert {name: value.tolist() for name, value in TensorFile(path).items()} == {"a": [0] * 3, "b": [1.0] * 2}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
def test_one_flipped_bit_is_seen_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    checkpoints = saved(tmp_path, 1, 2)
    file = checkpoints.path(2) / name
    content = bytearray(file.read_bytes())
    content[content.index(b'"samples": 2') + 11 if name == "state.json" else -1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ContractError, match=rf"{name} is damaged.*available checkpoints of this run: .*step-00000001"):
        checkpoints.find(str(checkpoints.path(2)))
    assert checkpoints.find("auto") == checkpoints.find(str(tmp_path)) == checkpoints.path(1)
    told = capsys.readouterr().err
    assert f"{file} is damaged" in told and f"warning: falling back to {checkpoints.path(1)}" in told
    only_weights = checkpoints.find("auto", moments=False)
    assert only_weights == checkpoints.path(2 if name.startswith("optimizer") else 1)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a cut state.json": lambda path: (path / "state.json").write_text('{"kind": "llm2clip-tr'),
    "no state.json": lambda path: (path / "state.json").unlink(),
    "a cut model": lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:9]),
    "no averages": lambda path: (path / "ema.safetensors").unlink(),
    "a header without end": lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 64),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    checkpoints = saved(tmp_path, 1, 2)
    DAMAGE[name](checkpoints.path(2))
    assert checkpoints.find("auto") == checkpoints.path(1)
    told = capsys.readouterr().err
    assert "step-00000002" in told and f"warning: falling back to {checkpoints.path(1)}" in told
    DAMAGE[name](checkpoints.path(1))
    with pytest.raises(ContractError, match=r"no checkpoint in .* is intact: .*step-00000002.*another --output"):
        checkpoints.find("auto")


def test_a_run_that_has_lost_its_checkpoints_does_not_start_over_in_silence(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    checkpoints = Checkpoints(tmp_path, keep=0)
    assert checkpoints.find("auto") is None  # killed before its first checkpoint
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "event": "checkpoint"}\n')
    with pytest.raises(FileNotFoundError, match=r"had saved step 1: restore .* or start over with --resume never"):
        checkpoints.find("auto")
    (tmp_path / "metrics.jsonl").unlink()
    RunRecord(config={}, config_hash="", step=5).write(tmp_path / RunRecord.FILE)
    with pytest.raises(FileNotFoundError, match="had saved step 5"):
        checkpoints.find("auto")
    assert checkpoints.find("never") is None


def test_going_back_moves_newer_checkpoints_aside_and_removes_none(tmp_path: Path):
    checkpoints = saved(tmp_path / "run", 1, 2, 3)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 3}\n')
    told = checkpoints.move_aside(checkpoints.path(1))
    assert "moved step-00000002, step-00000003 to" in told
    (aside,) = checkpoints.folder.glob("abandoned-*")
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000002", "step-00000003"]
    assert checkpoints.find("auto") == checkpoints.path(1) and checkpoints.move_aside(checkpoints.path(1)) == ""
    saved(tmp_path / "run", 2, 3, 4, keep=1)
    assert checkpoints.names() == ["step-00000004"]
    verify(aside / "step-00000003")
    other = saved(tmp_path / "other", 9)
    assert "moved step-00000004" in checkpoints.move_aside(
        other.path(9)
    )  # another run's steps are not mixed with these
    assert checkpoints.names() == [] and len(list(checkpoints.folder.glob("abandoned-*/step-*"))) == 3


def test_weights_of_another_model_are_refused(tmp_path: Path):
    weights = load(saved(tmp_path, 1).path(1)).weights
    with pytest.raises(ContractError, match=r"does not fit the model: only one of them has bias, w, weight"):
        load_weights(torch.nn.Linear(3, 1), weights, where=tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from llm2clip_plugin.train.guard import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        refused = rf"is in use by process {holder.pid} on {socket.gethostname()}, started 20.*delete .*run.lock"
        with pytest.raises(FileExistsError, match=refused):
            run_lock.acquire(run)

        def no_locks(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "lockf", no_locks)  # a file system without them
        with pytest.raises(FileExistsError, match=refused):
            run_lock.acquire(run)
    finally:
        holder.kill()
        holder.communicate()
    assert (run / run_lock.LOCK).is_file()
    run_lock.release(run, run_lock.acquire(run))
    there = {"host": "elsewhere", "pid": 1, "started": 0.0}
    (run / run_lock.LOCK).write_text(json.dumps(there))
    run_lock.release(run, run_lock.acquire(run))
    assert "names process 1 on elsewhere" in capsys.readouterr().err
    monkeypatch.undo()
    with run_lock.locked(run):
        assert json.loads((run / run_lock.LOCK).read_text())["pid"] == psutil.Process().pid
    assert not (run / run_lock.LOCK).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"--output .*file is a file, or below one; choose a folder"):
        run_lock.acquire(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"is a file, or below one"):
        run_lock.acquire(tmp_path / "file/run")
