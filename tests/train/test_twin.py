"""Self-distillation: the frozen twin under every ZeRO stage, over ranks and micro-batches, and through a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import make_all
from tower_runs import ROOT, lines, losses, options
from train_helpers import TinyDual, run_ranks, tiny_batch, tiny_engine, tiny_step

from llm2clip_plugin.train.checkpoint import TWIN, Checkpoints, HostCopies, Saver, TrainState, load
from llm2clip_plugin.train.reference import Twin

STEPS, SAVED_AT, DECAY = 4, 2, 0.8
TERMS = ("infonce", "distill=0.5")
ARGS = {"zero1": {"stage": 1, "micro": 8}, "zero2": {"stage": 2, "micro": 16}, "zero3": {"stage": 3, "micro": 8}}
WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0, "micro": 16},
    **ARGS,
    "bf16 zero1": {"stage": 1, "micro": 8, "precision": "bf16"},
    "start zero1": {"stage": 1, "micro": 8, "decay": None},
}


def build(world: int, way: dict[str, Any], loaded: Any = None) -> tuple[Any, Twin, Any]:
    """Engine, twin and step of a way, new or from a checkpoint."""
    way = dict(way)
    decay = way.pop("decay", DECAY)
    torch.manual_seed(0)
    dual = TinyDual()
    if loaded is not None:
        dual.load_state_dict(dict(loaded.weights))
    twin = Twin(dual, decay=decay)
    engine = tiny_engine(world=world, dual=dual, **way)
    if loaded is not None:
        engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
    twin.attach(engine, loaded.twin if loaded is not None else {})
    return engine, twin, tiny_step(engine, terms=TERMS, twin=twin)


def steps(built: tuple[Any, Twin, Any], numbers: range, rank: int, world: int) -> list[dict[str, float]]:
    _, twin, step = built
    values = []
    for i in numbers:
        values.append(step(tiny_batch(i, rank=rank, world=world))[1])
        twin.update()
    return values


def train(rank: int, world: int, folder: str, ways: list[str]) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half; weights after each half and the twin at the end."""
    results = {}
    for name in ways:
        built = build(world, WAYS[name])
        first = built[0].weights(HostCopies())
        losses = steps(built, range(SAVED_AT), rank, world)
        engine, twin, _ = built
        run = Path(folder) / f"{world} {name}"
        with Saver(Checkpoints(run, keep=1), engine, None, twin) as saver:
            saver.save(TrainState(step=SAVED_AT, samples=64, config={}, config_hash="", seed=5))
            saver.finish()
        losses += steps(built, range(SAVED_AT, STEPS), rank, world)
        results[name] = {"first": first, "losses": losses, "twin": twin.values(HostCopies())}
    return results


def resume(rank: int, world: int, folder: str, ways: list[tuple[str, str]]) -> dict[str, Any]:
    """The second half from a checkpoint ``WORLD WAY``, under another way."""
    results = {}
    for written, under in ways:
        path = Checkpoints(Path(folder) / written, keep=1).latest()
        assert path is not None and (path / TWIN).is_file()
        built = build(world, WAYS[under], load(path))
        losses = steps(built, range(SAVED_AT, STEPS), rank, world)
        results[f"{written} > {under}"] = {"losses": losses, "twin": built[1].values(HostCopies())}
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("twins")
    one = run_ranks(train, 1, str(folder), ["zero0", "start zero1"])[0]
    return folder, {1: one, 2: run_ranks(train, 2, str(folder), list(WAYS))[0]}


def of(values: list[dict[str, float]], name: str = "loss") -> list[float]:
    return [value[name if name != "loss" else "loss_infonce"] for value in values]


def test_any_stage_ranks_and_micro_batches_are_one_run(saved: tuple[Path, dict[int, dict[str, Any]]]):
    """fp32 sums in another order: 1e-5, times the structure's 255 for its share; bf16 rounds features to 8 bits."""
    _, runs = saved
    expected = runs[1]["zero0"]
    distances = of(expected["losses"], "loss_distill")
    assert distances[0] < 1e-6 and distances[-1] > 1e-3  # equal before the first update
    for name in ("zero0", *ARGS):
        actual = runs[2][name]
        assert of(actual["losses"]) == pytest.approx(of(expected["losses"]), abs=1e-4), name
        assert of(actual["losses"], "loss_distill") == pytest.approx(distances, abs=1e-2, rel=1e-3), name
        for key, value in expected["twin"].items():
            torch.testing.assert_close(actual["twin"][key], value, atol=1e-4, rtol=1e-3)
    half = runs[2]["bf16 zero1"]
    assert of(half["losses"]) == pytest.approx(of(expected["losses"]), abs=0.1)
    assert all(value.dtype == torch.float32 for value in half["twin"].values())


def test_the_reference_is_an_average_of_the_tower_or_the_tower_as_it_was(
    saved: tuple[Path, dict[int, dict[str, Any]]],
):
    _, runs = saved
    start, moved = runs[1]["start zero1"], runs[1]["zero0"]
    changed = 0
    for key, value in start["twin"].items():
        assert torch.equal(value, start["first"][key])
        changed += not torch.equal(moved["twin"][key], moved["first"][key])
    assert changed > 5 and not any(key.startswith("text_adapter") for key in moved["twin"])


def test_a_resumed_run_is_the_same_bit_for_bit_and_under_another_stage(
    saved: tuple[Path, dict[int, dict[str, Any]]],
):
    folder, runs = saved
    pairs = [(f"2 {name}", name) for name in WAYS] + [("2 zero3", "zero1"), ("1 zero0", "zero2")]
    resumed = run_ranks(resume, 2, str(folder), pairs)[0]
    for written, under in pairs:
        world, name = written.split(" ", 1)
        expected, actual = runs[int(world)][name], resumed[f"{written} > {under}"]
        exact = (world, name) == ("2", under)
        after = expected["losses"][SAVED_AT:]
        for term in ("loss", "loss_distill"):
            tolerance = 0.0 if exact else 1e-4 if term == "loss" else 1e-2
            assert of(actual["losses"], term) == pytest.approx(of(after, term), abs=tolerance), (written, under, term)
        for key, value in expected["twin"].items():
            if exact:
                assert torch.equal(actual["twin"][key], value), (written, key)


def commands(rank: int, world: int, tiny: str, run: str, cut: str) -> None:
    """A run of the command, then its first checkpoint in another folder, resumed by the same command."""
    from llm2clip_plugin.stages.tower.config import TRAIN_TOWER
    from llm2clip_plugin.stages.tower.run import train_tower

    terms = "--loss.terms infonce=1 multi_positive=0:0.5@0.5 distill=0.2 --loss.args distill.structure=9".split()
    more = ("--captions-per-image", "2", "--distill.decay", "0.8", "--max_steps", "4", "--train.micro-batch", "4")
    for folder in (Path(run), Path(cut)):
        train_tower(
            TRAIN_TOWER.parse(
                options(Path(tiny), folder, *terms, *more, "--deepspeed", str(ROOT / "scripts/zero3.json"))
            )
        )
        if folder == Path(run) and rank == 0:
            shutil.copytree(folder / "checkpoints/step-00000002", Path(cut) / "checkpoints/step-00000002")
        torch.distributed.barrier()


def test_a_killed_run_of_the_command_ends_as_the_whole_one(tmp_path: Path):
    """Heads, noise and several captions, ZeRO-3, gradient caching, two ranks; terms of which one grows."""
    tiny = make_all(tmp_path)
    run, cut = tmp_path / "run", tmp_path / "cut"
    run_ranks(commands, 2, str(tiny), str(run), str(cut))
    expected = losses(run)
    assert sorted(expected) == [1, 2, 3, 4]
    assert losses(cut) == {step: expected[step] for step in (3, 4)}
    first, *_, last = [line for line in lines(run) if "loss" in line]
    for term in ("loss_multi_positive", "loss_distill"):
        assert first[term] == 0.0 < last[term]
    twins = [load_file(folder / "checkpoints/step-00000004" / TWIN) for folder in (run, cut)]
    assert twins[0].keys() == twins[1].keys() and len(twins[0]) > 20
    assert all(torch.equal(value, twins[1][name]) for name, value in twins[0].items())
