"""How a run loads: what its loader processes need, and in which order it reads."""

import dataclasses

from llm2clip_plugin.data.read_rate import shuffle_window
from llm2clip_plugin.data.shared_memory import LoadPlan, plan_loading, row_bytes
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


def with_order(config: RunConfig) -> RunConfig:
    """The run with its ``shuffle_window`` decided by where its data is: it belongs to what a checkpoint records."""
    window = shuffle_window(config.data.read.shuffle_window, config.data.path)
    read = dataclasses.replace(config.data.read, shuffle_window=window)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, read=read))
