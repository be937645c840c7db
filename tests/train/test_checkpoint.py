"""Checkpoints: a run goes on bit by bit, or under another ZeRO stage, precision and number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import Averages, Engineless, allow_fp16, run_ranks, tiny_batch, tiny_engine, tiny_step

from llm2clip_plugin.files import ContractError
from llm2clip_plugin.train.checkpoint import Checkpoints, Saver, TrainState, load
from llm2clip_plugin.train.optim import set_lr

SMALL_8BIT = ("min_8bit_size=1",)
WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "bf16 zero1": {"stage": 1, "precision": "bf16"},
    "bf16 zero3": {"stage": 3, "precision": "bf16"},
    "fp16 zero2": {"stage": 2, "precision": "fp16"},
    # so small a min_8bit_size that also the group of norms, biases and scale, and each of their parts, is in 8 bits
    **{f"8bit zero{stage}": {"stage": stage, "name": "adamw_8bit", "args": SMALL_8BIT} for stage in range(4)},
    "8bit bf16 zero1": {"stage": 1, "precision": "bf16", "name": "adamw_8bit", "args": SMALL_8BIT},
    "8bit bf16 zero3": {"stage": 3, "precision": "bf16", "name": "adamw_8bit", "args": SMALL_8BIT},
    # some masters in fp32, some in 8 bits
    "8bit mixed zero2": {"stage": 2, "name": "adamw_8bit", "args": ("min_8bit_size=300",)},
}
FACTORS = [1.0, 0.8, 0.6, 0.4]  # a schedule, so that learning rates must come back too


def steps(engine: Any, step: Any, numbers: range, rank: int, world: int) -> list[float]:
    losses = []
    for i in numbers:
        set_lr(engine.groups, FACTORS[i])
        losses.append(step(tiny_batch(i, rank=rank, world=world))[0])
    return losses


def train_and_save(rank: int, world: int, folder: str, ways: list[str] | None = None) -> dict[str, list[float]]:
    """Two steps, a checkpoint, two more: for each way."""
    allow_fp16()
    losses = {}
    for name in ways or WAYS:
        engine = tiny_engine(micro=16, world=world, **WAYS[name])
        step = tiny_step(engine)
        steps(engine, step, range(2), rank, world)
        save_now(Path(folder) / name, TrainState(step=2, samples=64, config={}, config_hash="", seed=5), engine)
        losses[name] = steps(engine, step, range(2, 4), rank, world)
    return losses


def go_on(rank: int, world: int, folder: str, pairs: list[tuple[str, str]]) -> dict[str, list[float]]:
    """The last two steps from a checkpoint written one way, under another."""
    allow_fp16()
    losses = {}
    for written, under in pairs:
        path = Checkpoints(Path(folder) / written, keep=1).latest()
        assert path is not None
        loaded = load(path)
        engine = tiny_engine(micro=16, world=world, weights=loaded.weights, **WAYS[under])
        engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
        assert engine.updates == 2
        losses[f"{written} > {under}"] = steps(engine, tiny_step(engine), range(2, 4), rank, world)
    return losses


def save_now(run: Path, state: TrainState, engine: Any, average: Any = None, keep: int = 1) -> Path:
    """Write a checkpoint to its end."""
    with Saver(Checkpoints(run, keep=keep), engine, average) as saver:
        saver.save(state)
        saver.finish()
    return saver.checkpoints.path(state.step)


ON_ONE = [(name, name) for name in WAYS if "8bit" not in name] + [
    ("zero3", "zero1"),
    ("zero0", "zero3"),
    ("bf16 zero3", "bf16 zero1"),
]
ON_ONE += [("8bit zero0", "8bit zero0")]  # every rank holds all of it
ON_TWO = [(name, name) for name in WAYS] + [("zero2", "zero3"), ("zero3", "zero0")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(train_and_save, 2, str(folder))[0]


def test_the_same_ranks_resume_bit_for_bit(saved: tuple[Path, dict[str, list[float]]]):
    folder, losses = saved
    resumed = run_ranks(go_on, 2, str(folder), ON_TWO)[0]
    for written, under in ON_TWO:
        tolerance = 0.0 if written == under else 1e-5
        assert resumed[f"{written} > {under}"] == pytest.approx(losses[written], abs=tolerance), (written, under)


def test_resumes_with_another_number_of_ranks(saved: tuple[Path, dict[str, list[float]]]):
    """fp32 sums in another order: 1e-5, which 8-bit moments round to other values: 1e-3; bf16 and fp16 round features:
    hundredths."""
    folder, losses = saved
    resumed = run_ranks(go_on, 1, str(folder), ON_ONE)[0]
    for written, under in ON_ONE:
        tolerance = 0.03 if "16" in written else 1e-3 if "8bit" in written else 1e-5
        assert resumed[f"{written} > {under}"] == pytest.approx(losses[written], abs=tolerance), (written, under)


def test_one_rank_resumes_bit_for_bit_with_8_bit_moments(tmp_path: Path):
    ways = [name for name in WAYS if "8bit" in name]
    losses = run_ranks(train_and_save, 1, str(tmp_path), ways)[0]
    resumed = run_ranks(go_on, 1, str(tmp_path), [(name, name) for name in ways])[0]
    assert resumed == {f"{name} > {name}": losses[name] for name in ways}
    moments = load_file(tmp_path / "8bit zero2/checkpoints/step-00000002/optimizer.safetensors")
    saved = [value for name, value in moments.items() if name.endswith(("state1", "state2"))]
    assert saved and {value.dtype for value in saved} == {torch.uint8}


def refuse_moments(rank: int, world: int, folder: str, written: str, under: str) -> str:
    path = Checkpoints(Path(folder) / written, keep=1).latest()
    assert path is not None
    loaded = load(path)
    engine = tiny_engine(micro=16, world=world, weights=loaded.weights, **WAYS[under])
    try:
        engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("ranks", "written", "under", "named"),
    [
        (1, "8bit zero2", "zero2", "--optimizer"),
        (1, "zero2", "8bit zero2", "--optimizer"),
        (1, "8bit zero2", "8bit zero2", "zero2-of-1"),
        (2, "8bit zero2", "8bit zero3", "zero3-of-2"),
    ],
)
def test_moments_of_another_kind_or_layout_are_refused(
    saved: tuple[Path, dict[str, list[float]]], ranks: int, written: str, under: str, named: str
):
    for message in run_ranks(refuse_moments, ranks, str(saved[0]), written, under):
        assert named in message and "resume" in message


def test_masters_keep_the_digits_that_bf16_loses(saved: tuple[Path, dict[str, list[float]]]):
    folder, _ = saved
    path = Checkpoints(folder / "bf16 zero1", keep=1).latest()
    assert path is not None
    weights = load_file(path / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any((value != value.bfloat16().float()).any() for value in weights.values())


def test_weights_are_read_without_the_moments(saved: tuple[Path, dict[str, list[float]]], tmp_path: Path):
    path = Checkpoints(saved[0] / "zero2", keep=1).latest()
    assert path is not None
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy/optimizer.safetensors").unlink()
    loaded, full = load(tmp_path / "copy", moments=False), load(path)
    assert loaded.moments == {} and full.moments and loaded.weights.keys() == full.weights.keys()
    assert all(torch.equal(value, full.weights[name]) for name, value in loaded.weights.items())


def state(step: int) -> TrainState:
    return TrainState(step=step, samples=8 * step, config={}, config_hash="", seed=0)


def test_kept_to_a_number_and_leftovers_of_a_kill_are_removed(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        save_now(tmp_path, state(step), Engineless(), keep=2)
    assert checkpoints.names() == ["step-00000002", "step-00000003"]
    (checkpoints.folder / ".step-00000004.abc.tmp").mkdir()  # as a kill while writing leaves it
    assert checkpoints.latest() == checkpoints.folder / "step-00000003"
    save_now(tmp_path, state(4), Engineless(), Averages(), keep=2)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert load(checkpoints.folder / "step-00000004").averages["w"].tolist() == [0.0] * 3


def test_resume_of_something_that_is_not_there_is_an_error(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.find("auto") is None and checkpoints.find("never") is None
    with pytest.raises(FileNotFoundError, match=r"--resume /nowhere: no checkpoint found"):
        checkpoints.find("/nowhere")
    save_now(tmp_path / "run", state(1), Engineless())
    with pytest.raises(FileNotFoundError, match=r"available checkpoints of this run: \['step-00000001'\]"):
        checkpoints.find(str(tmp_path))
    assert checkpoints.find(str(tmp_path / "run")) == checkpoints.find("auto")
    with pytest.raises(FileExistsError, match="refusing to overwrite with --resume never"):
        checkpoints.find("never")


def test_damage_is_named(tmp_path: Path):
    path = save_now(tmp_path, state(1), Engineless())
    model = path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-4])
    with pytest.raises(ContractError, match=r"model.safetensors is not a complete safetensors file.*resume from"):
        load(path)
    model.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing from the checkpoint"):
        load(path)
    (path / "state.json").write_text(json.dumps({"kind": "something"}))
    with pytest.raises(ContractError, match="something"):
        load(path)
