"""Short runs of train-tower as commands, and what they wrote."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from forked import Process, Script
from forked_python import programs

from llm2clip_plugin.train.distributed import free_port

ROOT = Path(__file__).parents[2]
STEPS = 12
# train-tower, but it stops before the batch that ends at a sample, for ever: a test may kill it in
# peace
HELD = """
import sys, time
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.stages.run import TrainingRun

train_to_end = TrainingRun.train_to_end

def held(batches):
    for batch in batches:
        while batch["position"] == {position}:
            time.sleep(0.05)
        yield batch

def held_to_end(self, *arguments, batches, **options):
    return train_to_end(self, *arguments, batches=held(batches), **options)

TrainingRun.train_to_end = held_to_end
leave(run("train-tower", sys.argv[1:]))
"""


def options(tiny: Path, run: Path, *more: str) -> list[str]:
    """A short run with everything that must come back: heads, noise, layer decay, schedule, moving
    average."""
    return [
        *(
            "--recipe",
            "quickstart",
            "--tower.path",
            str(tiny / "tower"),
            "--tower.image-size",
            "16",
        ),
        *(
            "--data_path",
            str(tiny / "data"),
            "--output_dir",
            str(run),
            "--max_steps",
            str(STEPS),
        ),
        *("--tower.freeze-first-blocks", "0"),
        *(
            "--train.global-batch",
            "16",
            "--heads.steps",
            "3",
            "--train.ema-decay",
            "0.9",
        ),
        *(
            "--train.save-minutes",
            "0",
            "--save_steps",
            "2",
            "--evaluation.group=",
            *more,
        ),
    ]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, the package of this checkout, and no place among the ranks of another
    test."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ours = {name: value for name, value in os.environ.items() if name not in ranks}
    return {
        **ours,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "DS_ACCELERATOR": "cpu",
        **more,
    }


def places(world: int) -> list[dict[str, str]]:
    """The environment of each of ``world`` ranks on this machine."""
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        environment(RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(world)
    ]


def start(
    argv: list[str],
    world: int,
    script: str | Path = "scripts/train_tower.py",
    folder: Path = ROOT,
) -> list[Script]:
    """The script in ``world`` processes, as a launcher starts it."""
    return [
        Script(ROOT / script, [f"--local_rank={rank}", *argv], variables, folder)
        for rank, variables in enumerate(places(world))
    ]


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    """``deepspeed --num_gpus 2 WORDS``, to its end; its processes are forked."""
    command = [
        str(programs() / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        *words,
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def killed_at(argv: list[str], run: Path, step: int, *, saved: bool = True) -> None:
    """Start train-tower on two ranks, and kill them before the batch of ``step``, when the line of
    the step before it is there, and (``saved``) a checkpoint."""
    script = run.with_name(f"{run.name}-held.py")
    script.write_text(HELD.format(position=16 * step))
    ranks = start(argv, 2, script)
    wait_for(lambda: max(losses(run), default=0) == step - 1, ranks)
    wait_for(lambda: not saved or (run / "checkpoints/latest").is_file(), ranks)
    for rank in ranks:
        rank.kill()
    finish(ranks)


def wait_for(ready: Callable[[], object], processes: Sequence[Process] = ()) -> None:
    """Wait until ``ready``; AssertionError if one of the processes ends before."""
    deadline = time.monotonic() + 900
    while not ready():
        assert all(process.poll() is None for process in processes), processes[
            0
        ].output[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_of(run: Path) -> list[psutil.Process]:
    """Whose command line names the run's folder: those of a launcher, of its ranks, of their
    loaders."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(run) in (process.info["cmdline"] or ())
    ]


def ranks_of(run: Path) -> list[int]:
    """The training processes of a launcher, without the loader processes below these."""
    ranks = {}
    for process in processes_of(run):
        if any(word.startswith("--local_rank=") for word in process.info["cmdline"]):
            ranks[process.pid] = process.ppid()
    return [rank for rank, parent in ranks.items() if parent not in ranks]


def finish(processes: Sequence[Process]) -> list[int]:
    return [process.wait(timeout=900) for process in processes]


def lines(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds; a line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}
