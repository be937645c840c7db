"""The frozen tower that loss terms compare with: under every ZeRO stage, over ranks and
micro-batches, resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import (
    TinyDual,
    new_state,
    run_ranks,
    save_now,
    tiny_batch,
    tiny_engine,
    tiny_step,
)

from llm2clip_plugin.train.averages import ReferenceTower, copy_image_side
from llm2clip_plugin.train.checkpoint import REFERENCE, load, on_host

STEPS = 4
SAVED_AT = 2
DECAY = 0.8
TERMS = ("infonce", "distill=0.5")
FP32 = ("zero0", "zero1", "zero2", "zero3")
WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0, "micro": 16},
    "zero1": {"stage": 1, "micro": 8},
    "zero2": {"stage": 2, "micro": 16},
    "zero3": {"stage": 3, "micro": 8},
    "bf16 zero1": {"stage": 1, "micro": 8, "precision": "bf16"},
    "start zero1": {"stage": 1, "micro": 8, "decay": 1.0},
}


def build(
    world: int, way: dict[str, Any], loaded: Any = None
) -> tuple[Any, ReferenceTower, Any]:
    """Engine, reference and step of a way, new or from a checkpoint."""
    way = dict(way)
    decay = way.pop("decay", DECAY)
    torch.manual_seed(0)
    dual = TinyDual()
    if loaded is not None:
        dual.load_state_dict(dict(loaded.weights))
    frozen = copy_image_side(dual)
    engine = tiny_engine(world=world, dual=dual, **way)
    if loaded is not None:
        engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
    reference = ReferenceTower(
        engine, decay, frozen, values=loaded.reference if loaded is not None else None
    )
    return engine, reference, tiny_step(engine, terms=TERMS, reference=reference)


def steps(
    built: tuple[Any, ReferenceTower, Any], numbers: range, rank: int, world: int
) -> dict[str, list[float]]:
    _, reference, step = built
    values = []
    for i in numbers:
        values.append(step(tiny_batch(i, rank=rank, world=world))[1])
        reference.update()
    return {
        "loss_infonce": [value["loss_infonce"] for value in values],
        "loss_distill": [value["loss_distill"] for value in values],
    }


def train(rank: int, world: int, folder: str, ways: list[str]) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half: losses of both, weights before and the
    reference at the end."""
    results = {}
    for name in ways:
        built = build(world, WAYS[name])
        engine, reference, _ = built
        first = engine.weights(on_host)
        before = steps(built, range(SAVED_AT), rank, world)
        save_now(
            Path(folder) / f"{world} {name}",
            new_state(SAVED_AT),
            engine,
            {REFERENCE: reference},
        )
        after = steps(built, range(SAVED_AT, STEPS), rank, world)
        values = reference.values(on_host)
        results[name] = {
            "first": first,
            "before": before,
            "after": after,
            "values": values,
        }
    return results


def resume(
    rank: int, world: int, folder: str, ways: list[tuple[str, str]]
) -> dict[Any, Any]:
    """The second half from a checkpoint ``WORLD WAY``, under another way."""
    results = {}
    for written, under in ways:
        built = build(
            world,
            WAYS[under],
            load(Path(folder) / written / f"checkpoints/step-{SAVED_AT:08d}"),
        )
        after = steps(built, range(SAVED_AT, STEPS), rank, world)
        results[written, under] = {"after": after, "values": built[1].values(on_host)}
    return results


Runs = tuple[Path, dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("references")
    one_rank = run_ranks(train, 1, str(folder), ["zero0", "start zero1"])[0]
    return folder, {1: one_rank, 2: run_ranks(train, 2, str(folder), list(WAYS))[0]}


def test_any_stage_ranks_and_micro_batches_are_one_run(saved: Runs):
    """fp32 sums in another order: 1e-5, times the structure's 255 for its share; bf16 rounds
    features to 8 bits."""
    _, runs = saved
    expected = runs[1]["zero0"]
    assert expected["before"]["loss_distill"][0] < 1e-6  # equal before the first update
    assert expected["after"]["loss_distill"][-1] > 1e-3
    for name in FP32:
        for part in ("before", "after"):
            actual = runs[2][name][part]
            whole = expected[part]
            assert actual["loss_infonce"] == pytest.approx(
                whole["loss_infonce"], abs=1e-4
            ), name
            assert actual["loss_distill"] == pytest.approx(
                whole["loss_distill"], abs=1e-2, rel=1e-3
            ), name
        for key, value in expected["values"].items():
            torch.testing.assert_close(
                runs[2][name]["values"][key], value, atol=1e-4, rtol=1e-3
            )
    half = runs[2]["bf16 zero1"]
    assert half["after"]["loss_infonce"] == pytest.approx(
        expected["after"]["loss_infonce"], abs=0.1
    )
    assert all(value.dtype == torch.float32 for value in half["values"].values())


def test_a_resumed_run_is_the_same_bit_for_bit_and_under_another_stage(saved: Runs):
    folder, runs = saved
    pairs = [(f"2 {name}", name) for name in WAYS] + [
        ("2 zero3", "zero1"),
        ("1 zero0", "zero2"),
    ]
    resumed = run_ranks(resume, 2, str(folder), pairs)[0]
    for written, under in pairs:
        world, name = written.split(" ", 1)
        expected = runs[int(world)][name]
        actual = resumed[written, under]
        exact = (world, name) == ("2", under)
        for term, tolerance in (("loss_infonce", 1e-4), ("loss_distill", 1e-2)):
            near = pytest.approx(
                expected["after"][term], abs=0.0 if exact else tolerance
            )
            assert actual["after"][term] == near, (written, under, term)
        for key, value in expected["values"].items():
            assert not exact or torch.equal(actual["values"][key], value), (
                written,
                key,
            )
