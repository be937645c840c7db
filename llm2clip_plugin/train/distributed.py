"""The launcher's processes: join them, choose their device, exchange what they hold, measure where a step's time goes.

Everything here also works in one process without a process group, so callers need no special case for it.
"""

import functools
import itertools
import math
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm2clip_plugin.console import FirstRankError
from llm2clip_plugin.train.config import Tf32

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun, mpirun, mpiexec
MISSING_SECONDS = 10.0  # until a rank that waits for the others prints a line
# of a step. data: waiting for the loader. communication: features and losses of all ranks, and the reduction of
# gradients that DeepSpeed begins after the backward pass; what it overlaps with another phase is part of that phase
PHASES = ("data", "forward", "backward", "optimizer", "communication")

Value = TypeVar("Value")
ALONE: Literal["alone"] = "alone"  # this rank alone, whatever other ranks exist
Group = ProcessGroup | Literal["alone"] | None  # None: all ranks


def group_of(all_ranks: bool) -> Group:
    """The default group, or this rank alone."""
    return None if all_ranks else ALONE


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without a process group."""
    return 1 if group == ALONE or not dist.is_initialized() else dist.get_world_size(group)


def rank(group: Group = None) -> int:
    """This process's number; 0 without a process group."""
    return 0 if group == ALONE or not dist.is_initialized() else dist.get_rank(group)


def choose_device(name: str = "") -> torch.device:
    """The named device; by default this rank's GPU, or the CPU if there is none. Raises ValueError for one that this
    machine does not have."""
    if not name:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ValueError(f"--device {name} is not there; this machine has {known}") from error


def gpu_precision() -> Literal["bf16", "fp16"]:
    """bf16 if every GPU computes in it; fp16 before NVIDIA's Ampere (T4, V100), where torch emulates it slowly."""
    devices = range(torch.cuda.device_count())
    return "bf16" if all(torch.cuda.get_device_capability(device) >= (8, 0) for device in devices) else "fp16"


def join_ranks(device: torch.device, timeout: float) -> None:
    """Start the process group. timeout: seconds after which a collective that a rank does not join fails."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    line = "waiting for the other ranks of this launch; for a run in one process unset RANK and WORLD_SIZE"
    timer = threading.Timer(MISSING_SECONDS, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    finally:
        timer.cancel()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def set_single_process_environment() -> None:
    """Without a launcher, set what one would set for a single process; ValueError for one of several tasks of srun or
    mpirun, each of which would train alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        for name in TASKS:
            if (tasks := int(os.environ.get(name) or 1)) > 1:
                raise ValueError(f"{name} is {tasks}, RANK is not set: start torchrun per node (docs/scaling.md)")
        port = str(free_port())
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


class StepTimer:
    """Seconds of a step by phase, measured without making the device wait: where one phase ends and the next begins, a
    clock is read, or an event of the GPU recorded."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # phase, and where it begins; "" between steps

    def _mark(self, phase: str) -> None:
        moment: Any = torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter()
        if self._on_gpu:
            moment.record()
        self._marks.append((phase, moment))

    def start(self) -> None:
        """A step begins, with waiting for its data; this is the timer that ``timed`` reports to."""
        global _active
        _active = self
        self._mark("data")

    def switch(self, phase: str) -> str:
        """Another phase begins, "" as the step ends; returns the one before, "" (nothing is measured) between steps."""
        before = self._marks[-1][0] if self._marks else ""
        if before and before != phase:
            self._mark(phase)
        return before

    def lap(self) -> dict[str, float]:
        """Seconds by phase of the mean step since the last call; waits for the device to finish the last one."""
        marks, self._marks = self._marks, []
        if self._on_gpu and marks:
            marks[-1][1].synchronize()
        sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        steps = sum(not phase for phase, _ in marks)
        for (phase, first), (_, last) in itertools.pairwise(marks):
            if phase:
                sums[phase] += (first.elapsed_time(last) / 1000 if self._on_gpu else last - first) / steps
        return sums


_active: StepTimer | None = None


class timed(ContextDecorator):  # noqa: N801 - used like a function; a generator would cost twice as much
    """``with timed("backward"):`` the block is this phase of the step; the phase around it is interrupted. Also a
    decorator of a function."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def _recreate_cm(self) -> "timed":  # for each call of a decorated function
        return timed(self.phase)

    def __enter__(self) -> None:
        self.before = "" if _active is None else _active.switch(self.phase)

    def __exit__(self, *error: object) -> None:
        if self.before and _active is not None:
            _active.switch(self.before)


def gather_rows(local: Tensor, group: Group = None) -> Tensor:
    """(b, ...) on each rank -> (world * b, ...) in order of rank, without gradient. Every rank must hold b rows."""
    local = local.detach().contiguous()
    if world_size(group) == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size(group))]
    with timed("communication"):
        dist.all_gather(parts, local, group=group)
    return torch.cat(parts)


def gather_together(*tensors: Tensor, group: Group = None) -> list[Tensor]:
    """``gather_rows`` of each (b, n), of any types, in one collective: as bytes."""
    if world_size(group) == 1:
        return [gather_rows(local, group) for local in tensors]
    rows = [local.detach().contiguous().view(torch.uint8) for local in tensors]
    gathered = gather_rows(torch.cat(rows, 1), group).split([row.shape[1] for row in rows], 1)
    return [part.contiguous().view(local.dtype) for part, local in zip(gathered, tensors, strict=True)]


def sum_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """Sum in place over ranks; returns ``value``. Its device may be one that the backend cannot send from."""
    if world_size(group) == 1:
        return value
    with timed("communication"):
        if value.device.type == "cpu" and dist.get_backend() == "nccl":
            on_gpu = value.cuda()
            dist.all_reduce(on_gpu, group=group)
            return value.copy_(on_gpu)
        dist.all_reduce(value, group=group)
    return value


def sum_own_rows(values: Tensor, group: Group = None) -> Tensor:
    """(world * b, ...) on each rank -> (b, ...), this rank's rows of the sum over ranks: half of a sum's traffic."""
    if world_size(group) == 1:
        return values
    own = values.new_empty((len(values) // world_size(group), *values.shape[1:]))
    dist.reduce_scatter_tensor(own, values.contiguous(), group=group)
    return own


def gather_to_first(value: Value) -> list[Value]:
    """The value of every rank, in order of rank, on rank 0; [] on the others, which hold no copy."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def gather_objects(value: Value, group: Group = None) -> list[Value]:
    """The (small) value of every rank, in order of rank, on every rank."""
    if world_size(group) == 1:
        return [value]
    values = [value] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Value) -> Value:
    """Rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


_turns = itertools.count()  # of on_first_rank and leaving_together: the same on every rank


def on_first_rank(work: Callable[[], Value]) -> Value:
    """Call ``work`` on rank 0 alone; returns its (small) result on every rank, which all must call this.

    The others wait in no collective, so ``work`` may take hours, whatever the group's timeout. If it raises ValueError
    or OSError, they raise FirstRankError.
    """
    if world_size() == 1:
        return work()
    store, key = _turn()
    if rank() == 0:
        try:
            result, error = work(), None
        except (ValueError, OSError) as raised:
            result, error = None, raised
        store.set(key, pickle.dumps((result, None if error is None else str(error))))  # pyright: ignore[reportArgumentType]
        # rank 0 may host the store: if it ended now, the others would not get the answer
        _poll(lambda: store.add(f"{key}/read", 0) == world_size() - 1, limit=math.inf if error is None else 30.0)
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]
    _poll(lambda: store.check([key]))
    result, message = pickle.loads(store.get(key))
    store.add(f"{key}/read", 1)
    if message is not None:
        raise FirstRankError(message)
    return result


@contextmanager
def leaving_together() -> Iterator[None]:
    """Every rank enters the block, and none leaves it before all are at its end; no collective limits their time."""
    if world_size() == 1:
        yield
        return
    store, key = _turn()
    yield
    store.add(key, 1)
    on_first_rank(lambda: _poll(lambda: store.add(key, 0) == world_size()))


def _turn() -> tuple[dist.Store, str]:
    """The group's store, and a key in it that the ranks use once."""
    store = dist.distributed_c10d._get_default_store()
    return store, f"llm2clip/{_session(store)}/{next(_turns)}"


@functools.cache
def _session(store: dist.Store) -> str:
    """A name of this process group. torchrun's store outlives a restart, with the answers of the ranks before it."""
    return broadcast_object(uuid.uuid4().hex)


def _poll(ready: Callable[[], bool], *, limit: float = math.inf) -> None:
    """Wait until ``ready``, at most ``limit`` seconds, so that signals are still handled."""
    pause, deadline = 0.005, time.monotonic() + limit
    while not ready() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def set_tf32(tf32: Tf32, precision: str, device: torch.device) -> None:
    """Allow or forbid TF32, with 10 bits of mantissa, in products and convolutions of fp32 tensors on a GPU; auto:
    where the features come from half precision anyway, whose 7 or 10 bits round as much."""
    if device.type == "cuda":
        allowed = tf32 == "on" or (tf32 == "auto" and precision != "fp32")
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
