"""How a run loads: what its loader processes need, in which order it reads, and what that requires of the disk."""

import dataclasses
from collections.abc import Sequence

from llm2clip_plugin.data.file_system import file_system, is_network
from llm2clip_plugin.data.read_rate import (
    loose_images,
    read_rate,
    sample_bytes,
    shuffle_window,
)
from llm2clip_plugin.data.shared_memory import (
    LoadPlan,
    lacks_shared_memory,
    plan_loading,
    row_bytes,
)
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.stages.plan_text import WORLDS
from llm2clip_plugin.stages.tower.config import RunConfig

EVALUATION_PREFETCH = 2  # torch's default


def load_plans(config: RunConfig, side: int, width: int, world: int) -> list[LoadPlan]:
    """One for training, and one for evaluation if the run has a held-out split and loader processes for it.

    side: pixels of an image; width: of an embedding; world: ranks.
    """
    rows, micro_batch, _ = config.train.rows(world)
    plans = [
        plan_loading(
            rows=rows,
            micro_batch=micro_batch,
            workers=config.train.dataloader_num_workers,
            row_bytes=row_bytes(side, width * config.data.captions_per_image),
            prefetch_mb=config.train.dataloader_prefetch_mb,
        )
    ]
    batch, workers = config.evaluation.batch, config.evaluation.workers
    if config.data.validation and workers:
        plans.append(
            LoadPlan(
                rows=batch, part=batch, prefetch=EVALUATION_PREFETCH, workers=workers, row_bytes=row_bytes(side, 0)
            )
        )
    return plans


def describe_loading(plans: list[LoadPlan], ranks: int) -> str:
    """Processes, parts and memory of a rank's loader, and whether this machine has it for ``ranks`` ranks."""
    train = plans[0]
    memory = f"{train.host_bytes / 1e6:,.0f} MB of its own memory"
    if not sum(plan.workers for plan in plans):
        return f"loader of a rank: no processes (--workers), {memory}"
    shared = sum(plan.shared_bytes for plan in plans)
    text = (
        f"loader of a rank: {train.workers} processes, parts of {train.part} images, {shared / 1e6:,.0f} MB of "
        f"/dev/shm (--dataloader-prefetch-mb), {memory}"
    )
    if reason := lacks_shared_memory(plans, ranks):
        return f"{text}\n  too much for this machine: {reason}"
    return text


def with_order(config: RunConfig) -> RunConfig:
    """The run with its ``shuffle_window`` decided by where its data is: it belongs to what a checkpoint records."""
    window = shuffle_window(config.data.read.shuffle_window, config.data.path)
    read = dataclasses.replace(config.data.read, shuffle_window=window)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, read=read))


def describe_reading(config: RunConfig, sources: Sequence[Source]) -> str:
    """Order of the samples, and opens, reads and bytes a second on 1, 8 and 64 GPUs; without sources a hint."""
    if not sources:
        return "reading: pass DATA to see what the run requires of the disk"
    window = shuffle_window(config.data.read.shuffle_window, config.data.path)
    places = sorted({file_system(path) or "an unknown file system" for path in config.data.path})
    order = f"shuffled by windows of {window} shards" if window else "shuffled over entire sources"
    rate, workers = config.plan.images_per_second, max(1, config.train.dataloader_num_workers)
    shards, samples = sum(len(source.shards) for source in sources), sum(map(len, sources))
    size = sample_bytes(sources)
    lines = [
        f"reading from {', '.join(places)}: {samples:,} samples in {shards:,} shards, {order} "
        f"(--shuffle-window); at {rate:g} images/s a GPU (--images-per-second):"
    ]
    for world in WORLDS:
        reading = read_rate(
            images=rate * world,
            mean_bytes=size,
            shards=shards,
            samples=samples,
            window=window,
            processes=world * workers,
            loose=loose_images(sources),
        )
        lines.append(f"{world:6} GPUs: {reading}")
    if not window and any(map(is_network, config.data.path)):
        lines.append("  network file systems rarely sustain this many opens: leave --shuffle-window at -1")
    return "\n".join(lines)
