"""Reads of the data that a sample costs, and images a second where each of them takes a network's time.

Both ways read the same tars of 512-pixel JPEGs in random order, in one process, in alternation: every part of a sample
on its own, as version 0.1 did, and neighbors together. A read of a tar waits first, which stands for a network disk;
reads of the index, which stays in the page cache, are counted and don't wait. Prints Markdown.

    python scripts/bench_reads.py --images 256 --delay 0.005 --repeats 3
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
import tyro
from bench import alternate
from bench_data import BenchConfig as JpegConfig
from bench_data import write_tars

from llm2clip_plugin.data.images import EvalTransform, ImageConfig
from llm2clip_plugin.data.sources import webdataset
from llm2clip_plugin.data.sources.open import Source, SourceConfig, open_source

APART, TOGETHER = "each part on its own (0.1)", "neighbors in one read"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Reads of a sample, apart and together."""

    images: int = 256  # JPEGs in two tars
    side: int = 512  # pixels of the JPEGs
    size: int = 224  # pixels of the tower
    delay: float = 0.005  # seconds that a read of a tar waits
    repeats: int = 3


class Disk:
    """os.pread that counts, and waits before it reads a tar."""

    def __init__(self, delay: float) -> None:
        self.delay, self.pread = delay, os.pread
        self.tar_reads = self.other_reads = 0

    def __call__(self, descriptor: int, size: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tar"):
            self.tar_reads += 1
            time.sleep(self.delay)
        else:
            self.other_reads += 1
        return self.pread(descriptor, size, offset)


def main(config: BenchConfig) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder), JpegConfig(images=config.images, side=config.side))
        source = open_source(SourceConfig(path=folder))
        ways = {way: partial(read, way, source, config) for way in (APART, TOGETHER)}
        runs = alternate(ways, config.repeats)
    print(
        f"{config.images} samples in random order, {config.delay * 1000:g} ms a read of a tar, one process; medians of"
    )
    print(f"{config.repeats} runs, [lowest, highest]; {os.cpu_count()} cores.\n")
    print("| way | reads of a tar a sample | reads of the index a sample | images/s |")
    print("|---|---|---|---|")
    for way, timed in runs.items():
        speeds = [config.images / run.wall for run in timed]
        tars, others = timed[0].result
        shown = f"{statistics.median(speeds):.0f} [{min(speeds):.0f}, {max(speeds):.0f}]"
        print(f"| {way} | {tars / config.images:g} | {others / config.images:g} | {shown} |")


def read(way: str, source: Source, config: BenchConfig) -> tuple[int, int]:
    """Decode every image; returns reads of tars and of other files."""
    transform, disk, gap = EvalTransform(ImageConfig(size=config.size)), Disk(config.delay), webdataset.GAP
    sample: Callable = source.__getitem__ if way == APART else source.with_image
    os.pread, webdataset.GAP = disk, -1 if way == APART else gap
    try:
        for number in torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist():
            transform(sample(number).read_image())
    finally:
        os.pread, webdataset.GAP = disk.pread, gap
    return disk.tar_reads, disk.other_reads


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
