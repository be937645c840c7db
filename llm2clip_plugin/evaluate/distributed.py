"""The launcher's processes: join them, choose their device, gather what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def choose_device(name: str) -> torch.device:
    """The named device, or this process's accelerator, or the CPU."""
    if name:
        return torch.device(name)
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """(rank, world) of the launcher's processes, joined for as long as the block lasts; (0, 1) for one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> None:
    """Sum ``values`` over the default group, in place, also where NCCL wants them on the GPU."""
    if values.device.type == "cpu" and dist.get_backend() == "nccl":
        there = values.cuda()
        dist.all_reduce(there)
        values.copy_(there)
    else:
        dist.all_reduce(values)


def gather_objects(value: Value, all_ranks: bool) -> list[Value]:
    """The value of every rank of the default group, in their order; the value alone if not ``all_ranks``."""
    if not all_ranks:
        return [value]
    every: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every
