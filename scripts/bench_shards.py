"""Every command on many shards under a low limit of open files: the most that any process had open or mapped.

For each number of shards: tars of one sample are embedded, checked, trained on by two ranks with two loader processes
each, evaluated, and the LLM is fine-tuned on their captions. Prints Markdown. Any LLM and tower will do:

    python scripts/bench_shards.py --llm DIR --tower DIR --shards 200 20000 --open-files 1024
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from bench_start import write_tars

from llm2clip_plugin.train.distributed import free_port

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Peaks of open files and maps of every command, by number of shards."""

    llm: str  # folder of an LLM
    tower: str  # tower directory
    image_size: int = 16  # pixels, of the tower
    shards: tuple[int, ...] = (200, 20_000)
    open_files: int = 1024  # soft and hard limit of every process
    folder: str = ""  # for the files; "": a temporary one
    keep: bool = False  # the tars that are there, for another run
    only: tuple[str, ...] = ()  # commands by the first word of their name; empty: all


@dataclass
class Peak:
    """The most of any process at any time, and in which."""

    files: int = 0
    maps: int = 0


def main(config: BenchConfig) -> None:
    print(f"{len(os.sched_getaffinity(0))} cores, ulimit -n {config.open_files}\n")
    print("| command | shards | seconds | open files | maps |\n|---|---|---|---|---|", flush=True)
    root = Path(config.folder or tempfile.mkdtemp())
    for count in config.shards:
        data = root / f"shards-{count}"
        if not (config.keep and data.is_dir()):
            write_tars(data, count, 1)
        for name, words in commands(config, data).items():
            if config.only and name.split()[0].rstrip(",") not in config.only:
                continue
            started, peak = time.perf_counter(), run(words, config.open_files, root / f"{count}-{name}.log")
            print(
                f"| {name} | {count:,} | {time.perf_counter() - started:.0f} | {peak.files} | {peak.maps} |", flush=True
            )
    if not config.keep:
        shutil.rmtree(root)


def commands(config: BenchConfig, data: Path) -> dict[str, list[str]]:
    """Each command, in the order in which one needs the other's files."""
    python, bin = sys.executable, Path(sys.executable).parent
    ours = [python, "-m", "llm2clip_plugin.cli"]
    launcher = [str(bin / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    run = data.parent / f"run-{data.name}"
    if "train-tower" in (config.only or ("train-tower",)):
        shutil.rmtree(run, ignore_errors=True)
    train = ["--recipe", "quickstart", "--tower", config.tower, "--image-size", str(config.image_size)]
    train += ["--data_path", str(data), "--output", str(run / "tower"), "--max_steps", "20", "--heads.steps", "0"]
    train += ["--cache", str(data / "cache"), "--global-batch", "64", "--evaluation.group="]
    tune = ["--global-batch", "32", "--max-steps", "10"]
    return {
        "embed": [*ours, "embed", str(data), "--llm", config.llm, "--cache", str(data / "cache")],
        "embed again": [*ours, "embed", str(data), "--llm", config.llm, "--cache", str(data / "cache")],
        "data check": [*ours, "data", "check", str(data)],
        "train-tower, 2 ranks x 2 workers": [
            *(*launcher, str(ROOT / "scripts/train_tower.py"), *train, "--workers", "2")
        ],
        "evaluate": [
            *(*ours, "evaluate", str(run / "tower" / "tower"), "--data", str(data)),
            *("--cache", str(data / "cache"), "--resamples", "0", "--json", str(run / "scores.json")),
        ],
        "finetune-llm": [
            *(*launcher, str(ROOT / "scripts/finetune_llm.py"), str(data), "--llm", config.llm),
            *("--output", str(run / "llm"), *tune),
        ],
    }


def run(words: Sequence[str], open_files: int, log: Path) -> Peak:
    """Run a command and look at its processes four times a second. Raises RuntimeError if it fails."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, preexec_fn=limit)
        peak = Peak()
        while process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                look(pid, peak)
            time.sleep(0.25)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return peak


def look(pid: int, peak: Peak) -> None:
    try:
        peak.files = max(peak.files, len(os.listdir(f"/proc/{pid}/fd")))
        peak.maps = max(peak.maps, len(Path(f"/proc/{pid}/maps").read_text().splitlines()))
    except OSError:
        pass  # it has just ended


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
