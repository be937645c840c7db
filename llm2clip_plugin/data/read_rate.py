"""What a run requires of the disk, and which order of samples its disk sustains.

A sample read at random opens its shard, unless the process has it open already, and reads at one place of it. Local
disks bear that; file systems over a network have a server that every open of every rank asks, so there the order goes
by windows of shards (``shuffle_window``), which stay open meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip_plugin.data.file_system import MOUNTS, file_system, is_network
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.webdataset import OPEN_FILES, TarSource

NETWORK_WINDOW = 16  # shards; of 10,000 samples each: 160,000, dozens of global batches
CHECKED_RATE = 1000.0  # images a second and ...
CHECKED_PROCESSES = 64  # loader processes that `data check` assumes: a node of eight GPUs


def shuffle_window(configured: int, paths: Sequence[str], mounts: str = MOUNTS) -> int:
    """Shards that are shuffled together, 0 for whole sources: as configured, or, for -1, by where the data is."""
    if configured >= 0:
        return configured
    return NETWORK_WINDOW if any(is_network(path, mounts) for path in paths) else 0


@dataclass(frozen=True, kw_only=True)
class ReadRate:
    """What all loader processes of a run together ask of the disk or the server."""

    images: float  # a second
    opens: float  # a second
    bytes: float  # a second

    def __str__(self) -> str:
        return (
            f"{self.images:,.0f} images/s: {self.opens:,.0f} opens/s, {self.images:,.0f} samples read/s, "
            f"{self.bytes / 1e6:,.0f} MB/s"
        )


def read_rate(
    *,
    images: float,
    mean_bytes: float,
    shards: int,
    samples: int,
    window: int,
    processes: int,
    loose: float = 0.0,
) -> ReadRate:
    """The rate at ``images`` a second over all ranks.

    mean_bytes: of a sample; shards, samples: of the data; window: shards shuffled together, 0: all; processes: those
    that read, over all ranks; loose: see loose_images. A process opens each shard of a window once if it can keep the
    window open.
    """
    if not shards:
        return ReadRate(images=images, opens=0.0, bytes=images * mean_bytes)
    active = min(window or shards, shards)
    if active <= OPEN_FILES:
        windows = images / max(samples * active / shards, 1)  # windows a second
        opens = 0.0 if active == shards else min(images, windows * active * processes)
    else:
        opens = images * (1 - OPEN_FILES / active)
    return ReadRate(images=images, opens=opens * (1 - loose) + images * loose, bytes=images * mean_bytes)


def loose_images(sources: Sequence[Source]) -> float:
    """Fraction of the samples whose image is a file of its own, not a member of a tar."""
    loose = sum(len(source) for source in sources if not isinstance(source, TarSource))
    return loose / max(1, sum(map(len, sources)))


def reading_report(source: Source, mean_bytes: float) -> dict[str, Any]:
    """What training at CHECKED_RATE images a second on CHECKED_PROCESSES processes asks of a source's disk."""
    window = shuffle_window(source.config.shuffle_window, [source.path])
    rate = read_rate(
        images=CHECKED_RATE,
        mean_bytes=mean_bytes,
        shards=len(source.shards),
        samples=len(source),
        window=window,
        processes=CHECKED_PROCESSES,
        loose=loose_images([source]),
    )
    return {
        "file_system": file_system(source.path),
        "shuffle_window": window,
        "processes": CHECKED_PROCESSES,
        **{f"{name}_per_second": value for name, value in vars(rate).items()},
    }


def describe_report(report: dict[str, Any]) -> str:
    """``reading_report`` as a line."""
    rate = ReadRate(**{name: report[f"{name}_per_second"] for name in ("images", "opens", "bytes")})
    window = report["shuffle_window"]
    order = f"windows of {window} shards" if window else "any order"
    return (
        f"{report['file_system'] or 'unknown file system'}, {order}; {report['processes']} loader processes at {rate}"
    )
