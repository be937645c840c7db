"""Checkpoints in the background: killed while they are written, on a full disk, before the
evaluation."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from small_disk import fill, mounted
from tower_runs import lines, losses, wait_for
from train_helpers import (
    join_group,
    new_state,
    newest,
    parts_of,
    run_ranks,
    start_ranks,
    tiny_batch,
    tiny_engine,
)

from llm2clip_plugin.train import checkpoint
from llm2clip_plugin.train.checkpoint import (
    AVERAGES,
    MODEL,
    OPTIMIZER,
    Checkpoints,
    load,
)
from llm2clip_plugin.train.distributed import free_port, on_first_rank
from llm2clip_plugin.train.guard import Watch
from llm2clip_plugin.train.loop import run_loop

STEPS = 8


def train(rank: int, world: int, folder: str, stage: int, stuck_in: str = "") -> None:
    """Start or resume a run. stuck_in: the write of this file of the second checkpoint never
    ends."""
    run = Path(folder)
    write = checkpoint.write_tensors

    def write_in_part(path: Path, tensors: Any) -> str:
        digest = write(path, tensors)
        if path.name == stuck_in and (run / "checkpoints/latest").is_file():
            path.write_bytes(path.read_bytes()[:1000])
            (run / "stuck").touch()
            time.sleep(3600)
        return digest

    checkpoint.write_tensors = write_in_part
    engine, state, average = newest(run, world, stage=stage, micro=16)
    assert ".safetensors" not in Path("/proc/self/maps").read_text()
    batches = (tiny_batch(i, rank=rank, world=world) for i in range(state.step, STEPS))
    run_loop(parts_of(run, engine, state, batches, averages={AVERAGES: average}))


@pytest.mark.parametrize(("stage", "file"), [(1, OPTIMIZER), (3, MODEL)])
def test_killed_while_a_checkpoint_is_written_it_ends_bit_by_bit_the_same(
    tmp_path: Path, stage: int, file: str
):
    """On two ranks; SIGKILL while a file of a background write is there in part."""
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    run_ranks(train, 2, str(straight), stage)
    with tempfile.TemporaryDirectory() as store:
        processes = start_ranks(train, 2, store, str(killed), stage, file)
        wait_for((killed / "stuck").is_file)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    assert list((killed / "checkpoints").glob(".step-*.tmp"))
    assert len(list(killed.glob("checkpoints/step-*"))) == 1
    run_ranks(train, 2, str(killed), stage)
    assert losses(killed) == losses(straight)
    assert len(losses(killed)) == STEPS
    first, second = (
        load(run / f"checkpoints/step-{STEPS:08d}").state for run in (straight, killed)
    )
    assert first.files == second.files  # the same SHA-256 of every file
    assert len(first.files) == 3
    assert not list((killed / "checkpoints").glob(".*"))


def evaluated(rank: int, world: int, folder: str) -> None:
    """Every evaluation waits for the checkpoint of its step, which is written meanwhile."""
    run = Path(folder)
    calls = []

    def evaluate() -> dict[str, float]:
        calls.append(0)
        step = 4 if len(calls) == 1 else STEPS
        wait_for((run / f"checkpoints/step-{step:08d}/state.json").is_file)
        return {"i2t_r1": float(len(calls)), "t2i_r1": 0.0}

    engine = tiny_engine(stage=0, micro=32)
    config = {"eval_steps": 4, "save_total_limit": 0}
    parts = parts_of(
        run, engine, new_state(), iter(()), evaluate=evaluate, train=config
    )
    state = new_state()
    for steps in (4, STEPS):  # the last step of a run is always saved
        batches = (tiny_batch(i) for i in range(state.step, steps))
        state = run_loop(
            replace(parts, batches=batches, state=state, total_steps=steps)
        )
    # as after a kill between the last checkpoint and its evaluation
    run_loop(replace(parts, state=replace(state, evaluated=4)))


def test_a_checkpoint_is_written_while_its_step_is_evaluated(tmp_path: Path):
    """A kill in an evaluation loses neither; the scores enter the checkpoint that was written
    before."""
    run_ranks(evaluated, 1, str(tmp_path))
    saved = load(tmp_path / f"checkpoints/step-{STEPS:08d}").state
    assert saved.evaluated == STEPS
    assert saved.metrics == {"i2t_r1": 3.0, "t2i_r1": 0.0}
    assert [line["step"] for line in lines(tmp_path) if "i2t_r1" in line] == [
        4,
        STEPS,
        STEPS,
    ]
    events = [line for line in lines(tmp_path) if line.get("event") == "checkpoint"]
    assert events[-1]["step"] == STEPS
    assert {"waited_seconds", "write_seconds"} <= events[-1].keys()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


class Counting(Checkpoints):
    """Counts writes that have ended, failed ones too."""

    ended = 0

    def write(self, *arguments: Any) -> tuple[float, list[str]]:
        try:
            return super().write(*arguments)
        finally:
            self.ended += 1


def train_on_a_full_disk(rank: int, world: int, disk: str) -> dict[str, Any]:
    """The disk is full in the fourth step, free in the eighth, and full again at the end."""
    run = Path(disk) / "run"
    checkpoints = Counting(run, keep=2)
    names = []

    def batches() -> Iterator[Any]:
        for i in range(12):
            if rank == 0:
                # else a step that ends meanwhile is not saved
                wait_for(lambda steps=i: checkpoints.ended == steps)
                if i in (3, 11):
                    fill(Path(disk))
                elif i == 7:
                    names.append(checkpoints.names())
                    (Path(disk) / "filler").unlink()
            yield tiny_batch(i, rank=rank, world=world)

    engine = tiny_engine(stage=1, micro=16, world=world)
    more = {"checkpoints": checkpoints, "total_steps": 12}
    parts = parts_of(run, engine, new_state(), batches(), **more)
    try:
        run_loop(parts)
    except (OSError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__, "names": names}
    return {}


def test_a_full_disk_ends_no_training_before_the_last_save(small_disk: Path):
    first, second = run_ranks(train_on_a_full_disk, 2, str(small_disk))
    (small_disk / "filler").unlink()
    assert str(small_disk / "run/checkpoints/step-00000012") in first["error"]
    assert second["error"] == first["error"]
    assert first["kind"] == "OSError"
    assert second["kind"] == "FirstRankError"
    (kept,) = first["names"]  # on the full disk
    assert kept
    assert max(kept) <= "step-00000003"
    checkpoints = Checkpoints(small_disk / "run", keep=2)
    newest = checkpoints.find("auto")
    assert newest is not None
    assert "step-00000007" < newest.name < "step-00000012"
    # lines that a full disk delayed are not lost
    assert set(losses(small_disk / "run")) >= set(range(1, 11))
    events = [line["event"] for line in lines(small_disk / "run") if "event" in line]
    assert "checkpoint failed" in events
    assert events.count("checkpoint") >= 2


def wait_for_rank_0(rank: int, world: int) -> list[str]:
    """Rank 0 works longer than the process group's timeout; then it fails."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))

    def work() -> str:
        time.sleep(4)  # of this test, not of the machine: twice the timeout
        return f"of rank {rank}"

    answers = [on_first_rank(work)]
    try:
        on_first_rank(lambda: Path("/nowhere").stat())
    except (OSError, ValueError) as error:
        answers += [type(error).__name__, str(error)]
    return answers


def test_ranks_wait_for_rank_0_beyond_the_timeout_of_their_group():
    first, second = run_ranks(wait_for_rank_0, 2)
    assert first[0] == second[0] == "of rank 0"
    assert first[2] == second[2]
    assert first[1] == "FileNotFoundError"
    assert second[1] == "FirstRankError"


def hang(rank: int, world: int, port: int) -> str:
    """A collective of rank 1 fails; rank 0 is in none, and would wait for ever."""
    join_group(rank, world, f"tcp://127.0.0.1:{port}")
    watch = Watch(1.0)
    deadline = time.monotonic() + 60
    with suppress(RuntimeError), watch:
        if rank == 1:
            raise RuntimeError("gloo/transport: Timed out")
        while not watch.failure and time.monotonic() < deadline:
            time.sleep(0.05)
    return watch.failure


def test_a_rank_that_hangs_learns_that_the_others_have_ended():
    assert run_ranks(hang, 2, free_port())[0].endswith(
        "RuntimeError: gloo/transport: Timed out"
    )
