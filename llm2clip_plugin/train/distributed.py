"""The process group: how ranks find each other, and the few collectives that training needs.

Everything here also works in one process without a group, so callers never ask "is it distributed?".
"""

from __future__ import annotations

import os
import socket
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Alone(Enum):
    """In the place of a process group: this rank by itself, whatever other ranks there are."""

    ALONE = "alone"


ALONE = Alone.ALONE
Group = ProcessGroup | Alone | None  # None: all ranks


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without a process group."""
    return 1 if group is ALONE or not dist.is_initialized() else dist.get_world_size(group)


def rank(group: Group = None) -> int:
    """This process's number; 0 without a process group."""
    return 0 if group is ALONE or not dist.is_initialized() else dist.get_rank(group)


def local_world_size() -> int:
    """Number of ranks on this machine, as DeepSpeed's or torch's launcher told it; 1 without a launcher."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def set_single_process_environment() -> bool:
    """Set what a launcher would set, for one process; False where a launcher has done so.

    Without RANK and the others DeepSpeed would ask for mpi4py.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return False
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return True


def gather_rows(local: Tensor, group: Group = None) -> Tensor:
    """(b, ...) on each rank -> (world x b, ...), in order of rank, without gradient. Every rank must hold b rows."""
    local = local.detach().contiguous()
    if world_size(group) == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size(group))]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts)


def sum_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """Sum in place over ranks, and return it."""
    if world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


def any_rank(flag: bool, device: torch.device, group: Group = None) -> bool:
    """True on every rank if ``flag`` is true on one of them."""
    if world_size(group) == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """One small Python value a rank, in order of rank, on every rank."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, group: Group = None) -> Any:
    """Rank 0's value on every rank."""
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)  # pyright: ignore[reportArgumentType]
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()
