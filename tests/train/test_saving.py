"""Checkpoints in the background: killed while they are written, on a full disk, before the evaluation."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_disk import fill, mount, mounted, unmount
from tower_runs import lines, losses
from train_helpers import (
    Averages,
    Engineless,
    new_state,
    parts_of,
    run_ranks,
    start_ranks,
    tiny_batch,
    tiny_engine,
)

from llm2clip_plugin.contracts import atomic_directory, atomic_file
from llm2clip_plugin.train.checkpoint import Checkpoints, HostCopies, Saver, TrainState, load

STEPS = 8


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train(rank: int, world: int, folder: str, stages: list[int], *, slow: bool = False) -> None:
    """Start or resume a run for each ZeRO stage. slow: steps and files that take their time."""
    from llm2clip_plugin.train import checkpoint
    from llm2clip_plugin.train.loop import run_loop
    from llm2clip_plugin.train.reference import MovingAverage

    write = checkpoint.write_tensors

    def write_slowly(*arguments: Any) -> str:
        time.sleep(0.1)
        result = write(*arguments)
        time.sleep(0.1)
        return result

    def batches(start: int) -> Iterator[dict[str, Any]]:
        for i in range(start, STEPS):
            time.sleep(0.2 if slow else 0)
            yield tiny_batch(i, rank=rank, world=world)

    if slow:
        checkpoint.write_tensors = write_slowly
    for stage in stages:
        run = Path(folder) / str(stage)
        path = Checkpoints(run, keep=2).find("auto")
        loaded = load(path) if path else None
        engine = tiny_engine(stage=stage, micro=16, world=world, weights=loaded.weights if loaded else None)
        state, averages = new_state(), None
        if loaded:
            engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
            state, averages = loaded.state, loaded.averages
            assert ".safetensors" not in Path("/proc/self/maps").read_text()
        average = MovingAverage(engine, 0.9, updates=state.step, values=averages)
        run_loop(parts_of(run, engine, state, batches(state.step), average=average))


def train_slowly(rank: int, world: int, folder: str, stages: list[int]) -> None:
    train(rank, world, folder, stages, slow=True)


def test_killed_while_a_checkpoint_is_written_it_ends_bit_by_bit_the_same(tmp_path: Path):
    """ZeRO-1 and ZeRO-3 on two ranks; SIGKILL at a random moment of a background write."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_ranks(train, 2, str(straight), [1, 3])
    chance = random.Random(0)
    for stage in (1, 3):
        checkpoints = killed / str(stage) / "checkpoints"
        with tempfile.TemporaryDirectory() as store:
            processes = start_ranks(train_slowly, 2, store, str(killed), [stage])
            wait_until(lambda folder=checkpoints: (folder / "latest").is_file() and any(folder.glob(".step-*.tmp")))
            time.sleep(0.3 * chance.random())
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        assert max(losses(killed / str(stage))) < STEPS
    run_ranks(train, 2, str(killed), [1, 3])
    for stage in ("1", "3"):
        assert losses(killed / stage) == losses(straight / stage) and len(losses(killed / stage)) == STEPS
        first, second = (load(run / stage / f"checkpoints/step-{STEPS:08d}").state for run in (straight, killed))
        assert first.files == second.files and len(first.files) == 3  # the same SHA-256 of every file
        assert not list((killed / stage / "checkpoints").glob(".*"))


def test_a_checkpoint_is_written_while_its_step_is_evaluated(tmp_path: Path):
    """A kill in an evaluation loses neither; the scores enter the checkpoint that was written before."""
    run_ranks(evaluated, 1, str(tmp_path))
    saved = load(tmp_path / f"checkpoints/step-{STEPS:08d}").state
    assert saved.evaluated == STEPS and saved.metrics == {"i2t_r1": 3.0, "t2i_r1": 0.0}
    assert [line["step"] for line in lines(tmp_path) if "i2t_r1" in line] == [4, STEPS, STEPS]
    events = [line for line in lines(tmp_path) if line.get("event") == "checkpoint"]
    assert events[-1]["step"] == STEPS and {"waited_seconds", "write_seconds"} <= events[-1].keys()


def evaluated(rank: int, world: int, folder: str) -> None:
    from dataclasses import replace

    from llm2clip_plugin.train.loop import run_loop

    run, calls = Path(folder), []

    def evaluate() -> dict[str, float]:
        calls.append(0)
        step = 4 if len(calls) == 1 else STEPS
        wait_until((run / f"checkpoints/step-{step:08d}/state.json").is_file)
        return {"i2t_r1": float(len(calls)), "t2i_r1": 0.0}

    def batches() -> Iterator[Any]:
        for i in range(STEPS):
            if 1 <= i <= 3:  # so that no save waits for one before it, that of step 4 least of all
                wait_until((run / f"checkpoints/step-{i:08d}").is_dir)
                time.sleep(0.2)
            yield tiny_batch(i)

    engine = tiny_engine(stage=0, micro=32)
    config = {"eval_steps": 4}
    end = run_loop(parts_of(run, engine, new_state(), batches(), evaluate=evaluate, train=config))
    # as after a kill between the last checkpoint and its evaluation
    run_loop(parts_of(run, engine, replace(end, evaluated=4), iter(()), evaluate=evaluate, train=config))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


class Counting(Checkpoints):
    """Counts writes that failed."""

    failures = 0

    def write(self, *arguments: Any) -> list[str]:
        try:
            return super().write(*arguments)
        except OSError:
            self.failures += 1
            raise


def train_on_a_full_disk(rank: int, world: int, disk: str, fallback: str) -> dict[str, Any]:
    """The disk is full in the fourth step, free in the eighth, and full again at the end."""
    from llm2clip_plugin.train.loop import run_loop

    run = Path(disk) / "run"
    checkpoints = Counting(run, keep=2)
    names = []

    def batches() -> Iterator[Any]:
        for i in range(12):
            if rank == 0 and i == 3:
                wait_until(lambda: bool(checkpoints.names()))
                fill(Path(disk))
            if rank == 0 and i == 7:
                wait_until(lambda: checkpoints.failures > 0)
                names.append(checkpoints.names())
                (Path(disk) / "filler").unlink()
            if rank == 0 and i == 11:
                wait_until(lambda: checkpoints.names()[-1] > "step-00000007")
                wait_until(lambda: not list(checkpoints.folder.glob(".*.tmp")))
                fill(Path(disk))
            yield tiny_batch(i, rank=rank, world=world)

    parts = parts_of(
        run,
        tiny_engine(stage=1, micro=16, world=world),
        new_state(),
        batches(),
        checkpoints=checkpoints,
        total_steps=12,
        train={"save_fallback_dir": fallback},
    )
    try:
        run_loop(parts)
    except (OSError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__, "names": names}
    return {}


def test_a_full_disk_ends_no_training_and_the_last_state_is_kept_elsewhere(small_disk: Path, tmp_path: Path):
    first, second = run_ranks(train_on_a_full_disk, 2, str(small_disk), str(tmp_path / "other"))
    (small_disk / "filler").unlink()
    target = small_disk / "run/checkpoints/step-00000012"
    assert (
        f"cannot write the last checkpoint {target}: No space left on device (the disk at {small_disk} has "
        in first["error"]
    )
    assert f"resume with --resume {tmp_path / 'other/run'}" in first["error"]
    assert second["error"] == first["error"] and (first["kind"], second["kind"]) == ("OSError", "FirstRankError")
    (kept,) = first["names"]  # on the full disk
    assert kept and max(kept) <= "step-00000003"
    checkpoints = Checkpoints(small_disk / "run", keep=2)
    newest = checkpoints.find("auto")
    assert newest is not None and "step-00000007" < newest.name < "step-00000012"
    rescued = checkpoints.find(str(tmp_path / "other/run"))
    assert rescued == tmp_path / "other/run/checkpoints/step-00000012"
    assert set(losses(small_disk / "run")) >= set(range(1, 11))  # lines that a full disk delayed are not lost
    events = [line["event"] for line in lines(small_disk / "run") if "event" in line]
    assert "checkpoint failed" in events and events.count("checkpoint") >= 2


def wait_for_rank_0(rank: int, world: int, folder: str) -> list[str]:
    """Rank 0 works longer than the process group's timeout; then it fails."""
    from llm2clip_plugin.train.distributed import on_first_rank

    dist.destroy_process_group()
    store = f"file://{folder}/again"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=2))

    def work() -> str:
        time.sleep(4)
        return f"of rank {rank}"

    told = [on_first_rank(work)]
    try:
        on_first_rank(lambda: Path("/nowhere").stat())
    except (OSError, ValueError) as error:
        told += [type(error).__name__, str(error)]
    return told


def test_ranks_wait_for_rank_0_beyond_the_timeout_of_their_group(tmp_path: Path):
    first, second = run_ranks(wait_for_rank_0, 2, str(tmp_path))
    assert first[0] == second[0] == "of rank 0" and first[2] == second[2]
    assert (first[1], second[1]) == ("FileNotFoundError", "FirstRankError")


def test_safetensors_on_a_full_disk_is_an_os_error(small_disk: Path):
    fill(small_disk)
    for atomic in (atomic_file, atomic_directory):
        with pytest.raises(OSError, match=r"cannot write .*tensors: .*No space left"):
            with atomic(small_disk / "tensors") as temporary:
                save_file({"a": torch.ones(1000)}, temporary / "x" if temporary.is_dir() else temporary)
        assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_what_cannot_be_removed_is_a_warning_and_tried_again(tmp_path: Path):
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path / "run", keep=1)

    def save(step: int) -> None:
        with Saver(checkpoints, Engineless(), Averages(), note=told.append) as saver:
            saver.save(TrainState(step=step, samples=step, config={}, config_hash="", seed=0))
            saver.finish()

    save(1)
    mount(checkpoints.path(1) / "busy", "64k")  # as a file on NFS that is still open
    try:
        save(2)
        assert any("cannot remove" in line and "step-00000001" in line for line in told), told
        assert checkpoints.find("auto") == checkpoints.path(2)
        assert checkpoints.names() == ["step-00000002"]
    finally:
        (busy,) = checkpoints.folder.glob("*/busy")
        unmount(busy)
    save(3)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step-00000003"]


def test_a_disk_that_is_gone_is_one_error_on_a_save_that_must_succeed(tmp_path: Path):
    told, events = [], []
    (tmp_path / "run").write_text("not a folder")
    saver = Saver(Checkpoints(tmp_path / "run", keep=1), Engineless(), note=told.append, event=events.append)
    saver.save(TrainState(step=3, samples=1, config={}, config_hash="", seed=0))
    with pytest.raises(OSError, match=r"cannot write the last checkpoint .*step-00000003: .*--save-fallback-dir"):
        saver.finish()
    saver.save(TrainState(step=4, samples=1, config={}, config_hash="", seed=0))
    with saver:
        pass
    assert "there is no other checkpoint yet" in told[0] and events[0]["event"] == "checkpoint failed"
    json.dumps(events)


def test_copies_are_independent_and_use_their_memory_again():
    copies, value = HostCopies(), torch.arange(4.0)
    first = copies("a", value)
    value += 1
    assert first.tolist() == [0, 1, 2, 3]
    again = copies("a", value)
    assert again.data_ptr() == first.data_ptr() and again.tolist() == [1, 2, 3, 4]
    assert copies("a", torch.ones(2)).tolist() == [1, 1] and copies("b", value, torch.float64).dtype == torch.float64
