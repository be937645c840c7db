"""Checkpoints: a run goes on bit by bit, or under another ZeRO stage, precision and number of
ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import (
    allow_fp16,
    new_state,
    run_ranks,
    save_now,
    tiny_batch,
    tiny_engine,
    tiny_step,
)

from llm2clip_plugin.train.checkpoint import load
from llm2clip_plugin.train.optim import set_lr

EIGHT: dict[str, Any] = {"name": "adamw_8bit", "args": ("min_8bit_size=1",)}
WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "bf16 zero1": {"stage": 1, "precision": "bf16"},
    "bf16 zero3": {"stage": 3, "precision": "bf16"},
    "fp16 zero2": {"stage": 2, "precision": "fp16"},
    # so small a min_8bit_size that also the group of norms, biases and scale, and each of their
    # parts, is in 8 bits
    **{f"8bit zero{stage}": {"stage": stage, **EIGHT} for stage in range(4)},
    "8bit bf16 zero3": {"stage": 3, "precision": "bf16", **EIGHT},
    # some masters in fp32, some in 8 bits
    "8bit mixed zero2": {
        "stage": 2,
        "name": "adamw_8bit",
        "args": ("min_8bit_size=300",),
    },
}
FACTORS = [1.0, 0.8, 0.6, 0.4]  # a schedule, so that learning rates must come back too


def steps(engine: Any, step: Any, numbers: range, rank: int, world: int) -> list[float]:
    losses = []
    for i in numbers:
        set_lr(engine.groups, FACTORS[i])
        losses.append(step(tiny_batch(i, rank=rank, world=world))[0])
    return losses


def train_and_save(rank: int, world: int, folder: str) -> dict[str, list[float]]:
    """Two steps, a checkpoint, two more: for each way."""
    allow_fp16()
    losses = {}
    for name, way in WAYS.items():
        engine = tiny_engine(micro=16, world=world, **way)
        step = tiny_step(engine)
        steps(engine, step, range(2), rank, world)
        save_now(Path(folder) / name, new_state(2), engine)
        losses[name] = steps(engine, step, range(2, 4), rank, world)
    return losses


def go_on(
    rank: int, world: int, folder: str, pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], Any]:
    """The last two steps from a checkpoint written one way, under another; or the error."""
    allow_fp16()
    losses: dict[tuple[str, str], Any] = {}
    for written, under in pairs:
        loaded = load(Path(folder) / written / "checkpoints/step-00000002")
        engine = tiny_engine(
            micro=16, world=world, weights=loaded.weights, **WAYS[under]
        )
        try:
            engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
        except ValueError as error:
            losses[written, under] = str(error)
            continue
        assert engine.updates == 2
        losses[written, under] = steps(
            engine, tiny_step(engine), range(2, 4), rank, world
        )
    return losses


ON_ONE = [(name, name) for name in WAYS if "8bit" not in name]
ON_ONE += [
    ("zero3", "zero1"),
    ("zero0", "zero3"),
    ("bf16 zero3", "bf16 zero1"),
    ("8bit zero0", "8bit zero0"),
]
ON_TWO = [(name, name) for name in WAYS] + [("zero2", "zero3"), ("zero3", "zero0")]
REFUSED_ON_ONE = {
    ("8bit zero2", "zero2"): "--optimizer",
    ("zero2", "8bit zero2"): "--optimizer",
    ("8bit zero2", "8bit zero2"): "zero2-of-1",
}
REFUSED_ON_TWO = {("8bit zero2", "8bit zero3"): "zero3-of-2"}


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(train_and_save, 2, str(folder))[0]


def test_the_same_ranks_resume_bit_for_bit(saved: tuple[Path, dict[str, list[float]]]):
    folder, losses = saved
    for resumed in run_ranks(go_on, 2, str(folder), [*ON_TWO, *REFUSED_ON_TWO]):
        for written, under in ON_TWO:
            tolerance = 0.0 if written == under else 1e-5
            assert resumed[written, under] == pytest.approx(
                losses[written], abs=tolerance
            ), (
                written,
                under,
            )
        for pair, named in REFUSED_ON_TWO.items():
            assert named in resumed[pair]


def test_resumes_with_another_number_of_ranks(
    saved: tuple[Path, dict[str, list[float]]],
):
    """fp32 sums in another order: 1e-5, which 8-bit moments round to other values: 1e-3; bf16 and
    fp16 round features: hundredths."""
    folder, losses = saved
    resumed = run_ranks(go_on, 1, str(folder), [*ON_ONE, *REFUSED_ON_ONE])[0]
    for written, under in ON_ONE:
        tolerance = 0.03 if "16" in written else 1e-3 if "8bit" in written else 1e-5
        assert resumed[written, under] == pytest.approx(
            losses[written], abs=tolerance
        ), (
            written,
            under,
        )
    for pair, named in REFUSED_ON_ONE.items():
        assert named in resumed[pair]


def test_what_a_checkpoint_holds(
    saved: tuple[Path, dict[str, list[float]]], tmp_path: Path
):
    """Masters with the digits that bf16 loses, moments of 8 bits in 8 bits; weights are read
    without the moments."""
    folder, _ = saved
    weights = load_file(
        folder / "bf16 zero1/checkpoints/step-00000002/model.safetensors"
    )
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any((value != value.bfloat16().float()).any() for value in weights.values())
    moments = load_file(
        folder / "8bit zero2/checkpoints/step-00000002/optimizer.safetensors"
    )
    in_8bit = [
        value for name, value in moments.items() if name.endswith(("state1", "state2"))
    ]
    assert in_8bit
    assert {value.dtype for value in in_8bit} == {torch.uint8}
    path = folder / "zero2/checkpoints/step-00000002"
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy/optimizer.safetensors").unlink()
    loaded = load(tmp_path / "copy", moments=False)
    full = load(path)
    assert loaded.moments == {}
    assert full.moments
    assert loaded.weights.keys() == full.weights.keys()
    assert all(
        torch.equal(value, full.weights[name]) for name, value in loaded.weights.items()
    )
