"""What handing images over costs: bytes in parts of a batch, against normalized batches as in version 0.1.

Both ways load the same JPEGs with as many loader processes, in alternation, each time in a new process. Speed: images a
second that a rank gets, normalized, once without and once with a delay that stands for a slow disk. Memory: while the
rank is in a long step, and everything that may be prepared ahead is. Prints Markdown.

    python scripts/bench_loader.py --rows 256 --workers 2 --repeats 3
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
import tyro
from bench_data import BenchConfig as JpegConfig
from bench_data import write_tars
from torch import Tensor
from torch.utils.data import DataLoader

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairDataset, collate, make_loader
from llm2clip_plugin.data.pair_dataset import Row
from llm2clip_plugin.data.parts import PartDraws
from llm2clip_plugin.data.sampler import Draw
from llm2clip_plugin.data.sources.open import SourceConfig, open_source

OLD, NEW = "normalized batches, four ahead (0.1)", "bytes, in parts"
WAYS = {"old": OLD, "new": NEW}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Memory and speed of the two ways to hand over images."""

    images: int = 256  # JPEGs
    side: int = 512  # pixels of the JPEGs
    size: int = 336  # pixels of the tower
    rows: int = 256  # of a rank's batch
    micro_batch: int = 64  # rows that are normalized at once
    workers: int = 2  # loader processes
    batches: int = 2  # timed, after the first one
    delay: float = 0.005  # seconds a sample that stand for a slow disk
    repeats: int = 3
    data: str = ""  # folder of the JPEGs; "": made for the benchmark
    only: Literal["", "old speed", "old memory", "new speed", "new memory"] = ""  # measure this once, print JSON


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of one way."""

    speed: float  # images a second
    shared: float = 0.0  # peak of /dev/shm, MB
    memory: float = 0.0  # peak of the rank and its loader processes without shared memory, MB


class SlowDataset(PairDataset):
    """Every sample waits first."""

    delay = 0.0

    def __getitem__(self, draw: Draw) -> Row:
        time.sleep(self.delay)
        return super().__getitem__(draw)


def main(config: BenchConfig) -> None:
    if config.only:
        way, _, what = config.only.partition(" ")
        measure = measure_speed if what == "speed" else measure_memory
        print(json.dumps(vars(measure(WAYS[way], config))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder), JpegConfig(images=config.images, side=config.side))
        config = dataclasses.replace(config, data=folder)
        results: dict[tuple[str, str], list[Measured]] = {}
        for _ in range(config.repeats):
            for short, way in WAYS.items():
                for name, only, delay in (
                    ("speed", f"{short} speed", 0.0),
                    ("slow disk", f"{short} speed", config.delay),
                    ("memory", f"{short} memory", 0.0),
                ):
                    results.setdefault((way, name), []).append(in_new_process(config, only, delay))
        print(f"{config.rows} rows of {config.size} px a batch, {config.workers} loader processes; medians of")
        print(f"{config.repeats} runs, [lowest, highest]; {os.cpu_count()} cores.\n")
        print(f"| way | /dev/shm, MB | other memory, MB | images/s | images/s at {config.delay * 1000:g} ms a sample |")
        print("|---|---|---|---|---|")
        for way in (OLD, NEW):
            memory = results[way, "memory"]
            cells = [[run.shared for run in memory], [run.memory for run in memory]]
            cells += [[run.speed for run in results[way, name]] for name in ("speed", "slow disk")]
            print(f"| {way} | " + " | ".join(map(summary, cells)) + " |")


def in_new_process(config: BenchConfig, only: str, delay: float) -> Measured:
    """One measurement by this script in another process."""
    options = {**vars(config), "only": only, "delay": delay}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure_speed(way: str, config: BenchConfig) -> Measured:
    """Images a second of a rank that only normalizes them, after a first batch."""
    stream = pixels(way, config)
    next(stream)
    start = time.perf_counter()
    count = sum(len(batch) for batch in islice(stream, config.batches * config.rows // config.micro_batch))
    return Measured(speed=count / (time.perf_counter() - start))


def measure_memory(way: str, config: BenchConfig) -> Measured:
    """Peaks while the rank uses a batch for as long as its loader processes prepare more."""
    before, peaks, stop = used(), [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            peaks[0] = max(peaks[0], used() - before)
            peaks[1] = max(peaks[1], private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    stream = pixels(way, config)
    first = next(stream)
    first_batch = time.perf_counter() - start
    time.sleep(first_batch * 6)  # as long as six batches take
    stop.set()
    watcher.join()
    return Measured(speed=len(first), shared=peaks[0] / 1e6, memory=peaks[1] / 1e6)


def pixels(way: str, config: BenchConfig) -> Iterator[Tensor]:
    """Normalized micro-batches in order."""
    torch.set_num_threads(1)
    images = ImageConfig(size=config.size)
    dataset = SlowDataset([open_source(SourceConfig(path=config.data))], [None], images, seed=0)
    dataset.delay = config.delay
    if way == OLD:
        draws = PartDraws(dataset.mixture(), 0, 0, 1, config.rows, config.rows)
        loader = DataLoader(
            dataset,
            batch_sampler=draws,  # pyright: ignore[reportArgumentType] - endless
            num_workers=config.workers,
            collate_fn=NormalizingCollate(images),
            prefetch_factor=4,
        )
        for batch in loader:
            yield from batch["pixel_values"].split(config.micro_batch)
        return
    normalize = Normalize(images, "cuda" if torch.cuda.is_available() else "cpu")
    for batch in make_loader(dataset, local_batch=config.rows, micro_batch=config.micro_batch, workers=config.workers):
        yield from map(normalize, batch["pixels"].split(config.micro_batch))


class NormalizingCollate:
    """Version 0.1's collate function: float32 pixels, made by the loader process."""

    def __init__(self, images: ImageConfig) -> None:
        self.normalize = Normalize(images)

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        batch = collate(rows)
        return {**batch, "pixel_values": self.normalize(batch.pop("pixels"))}


def used() -> float:
    """Bytes of /dev/shm in use."""
    status = os.statvfs("/dev/shm")
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def private() -> float:
    """Bytes of anonymous memory of this process and its children; a page of several counts once."""
    children = [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    total = 0
    for process in ("self", *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (OSError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
    return total


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}]"


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
