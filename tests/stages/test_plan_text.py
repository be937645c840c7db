"""Plans by numbers of GPUs."""

from __future__ import annotations

from llm2clip_plugin.stages.run import GIB, Column, columns
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.model import StepMemory


def planned(global_batch: int, gpu_gib: float, micro_batch: int = 0) -> list[Column]:
    memory = StepMemory(
        precision="bf16",
        trained=300_000_000,
        frozen_bytes=0,
        parameters=300_000_000,
        pair_bytes=200 << 20,
        width=5,
        state_bytes=8,
    )
    return columns(memory, TrainConfig(global_batch=global_batch, micro_batch=micro_batch), gpu_gib)


def test_the_proposed_micro_batch_fits_and_the_next_does_not():
    for column in planned(4096, 40):
        assert column.total[1] <= 0.9 * 40 * GIB and 4096 // column.world % column.micro_batch == 0
        if column.micro_batch < 4096 // column.world:
            more = planned(4096, 40, 2 * column.micro_batch)
            assert next(c.total[1] for c in more if c.world == column.world) > 0.9 * 40 * GIB
    assert [c.micro_batch for c in planned(100, 40)][2] == 0  # 100 on 64
    assert [c.micro_batch for c in planned(4096, 1)] == [0, 0, 0]
