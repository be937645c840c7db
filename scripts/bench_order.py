"""What the order of an epoch over two large sources costs: counted as it is read, against stored as in version 0.1.

Each way runs in a new process, alternating. Measured at the first batch of an epoch, at a batch in the middle of the
next one after a resume, and at the batch that follows. Prints Markdown.

    python scripts/bench_order.py --samples 60_000_000 --repeats 1
"""

import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tyro
from bench import in_new_process, timed

from llm2clip_plugin.data.permutation import Permutation
from llm2clip_plugin.data.source_order import SourceOrder

BLOCK = 4096  # positions between two counts that version 0.1 stored
ROWS = 512  # draws of a batch
Sources = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Seconds and memory of the two ways to know which source each draw of an epoch comes from."""

    samples: int = 60_000_000  # of each of two sources
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Processor seconds and memory of a process."""

    first: float  # the first batch of an epoch
    resumed: float  # a batch in the middle of an epoch, by a process that begins there
    following: float  # the batch after it
    megabytes: float  # peak memory above that of the imports


def stored_order(draws: list[int], key: int) -> Sources:
    """Version 0.1: the source of every draw, and counts before every 4096th."""
    length, stops = sum(draws), np.cumsum(draws)
    permute = Permutation(length, key)
    order = np.empty(length, dtype=np.uint16)
    counts = [np.zeros(len(draws), dtype=np.int64)]
    for start in range(0, length, BLOCK):
        block = permute(np.arange(start, min(start + BLOCK, length)))
        order[start : start + len(block)] = np.searchsorted(stops, block, side="right")
        counts.append(counts[-1] + np.bincount(order[start : start + len(block)], minlength=len(draws)))
    all_counts = np.array(counts)

    def sources(offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        block = offset // BLOCK
        labels = order[block * BLOCK : offset + count]
        ranks = np.empty(len(labels), dtype=np.int64)
        for source in range(len(draws)):
            here = labels == source
            ranks[here] = all_counts[block, source] + np.arange(np.count_nonzero(here))
        skip = offset - block * BLOCK
        return labels[skip:].astype(np.int64), ranks[skip:]

    return sources


WAYS: dict[str, Callable[[list[int], int], Sources]] = {"stored (0.1)": stored_order, "counted": SourceOrder}


def measure(way: str, samples: int, middle: bool) -> tuple[float, float, float, int]:
    """Processor seconds of a batch and of the next one, memory, and a checksum of both."""
    draws, offset = [samples, samples], samples - 1000 if middle else 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def batch() -> tuple[Sources, int]:
        sources = WAYS[way](draws, 7)
        return sources, checksum(sources, offset)

    first = timed(batch)
    sources, start = first.result
    following = timed(lambda: checksum(sources, offset + 8 * ROWS))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return first.cpu, following.cpu, memory, start + following.result


def checksum(sources: Sources, offset: int) -> int:
    labels, ranks = sources(offset, ROWS)
    return int((labels * 3 + ranks).sum())


def main(config: BenchConfig) -> None:
    runs: dict[str, list[Measured]] = {way: [] for way in WAYS}
    sums = set()
    for _ in range(config.repeats):
        for way in WAYS:
            begun = in_new_process(measure, way, config.samples, False)
            resumed = in_new_process(measure, way, config.samples, True)
            memory = max(begun[2], resumed[2])
            runs[way].append(Measured(first=begun[0], resumed=resumed[0], following=resumed[1], megabytes=memory))
            sums.add((begun[3], resumed[3]))
    assert len(sums) == 1, "the two ways differ"
    print(f"Two sources of {config.samples:,} samples, {config.repeats} runs, medians.\n")
    print("| order | first batch of an epoch, CPU s | batch after a resume, CPU s | next batch, CPU s | memory, MB |")
    print("|---|---|---|---|---|")
    for way, measured in runs.items():
        cells = [[vars(run)[name] for run in measured] for name in ("first", "resumed", "following", "megabytes")]
        print(f"| {way} | " + " | ".join(f"{statistics.median(values):.4g}" for values in cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
