"""How a run loads: what its loader processes need, and in which order it reads."""

import dataclasses

from llm2clip_plugin.data.file_system import shuffle_window
from llm2clip_plugin.data.shared_memory import (
    LoadPlan,
    lacks_shared_memory,
    plan_loading,
    row_bytes,
)
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
