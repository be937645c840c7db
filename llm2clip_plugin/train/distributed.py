"""The launcher's processes: join them, choose their device, exchange what they hold, measure where
a step's time goes.

Everything here also works in one process without a process group, so callers need no special case
for it.
"""

import functools
import ipaddress
import itertools
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm2clip_plugin.errors import FirstRankError
from llm2clip_plugin.train.config import Tf32
from llm2clip_plugin.train.wire import pack, unpack

TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
LOOPBACK = "127.0.0.1"
MISSING_SECONDS = 10.0  # until a rank that waits for the others prints a line
# of a step. data: waiting for the loader. communication: features and losses of all ranks, and the
# reduction of gradients that DeepSpeed begins after the backward pass; what it overlaps with
# another phase is part of that phase
PHASES = ("data", "forward", "backward", "optimizer", "communication")

Value = TypeVar("Value")
ALONE: Literal["alone"] = "alone"  # this rank alone, whatever other ranks exist
Group = ProcessGroup | Literal["alone"] | None  # None: all ranks


def group_of(all_ranks: bool) -> Group:
    """The default group, or this rank alone."""
    return None if all_ranks else ALONE


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without a process group."""
    return (
        1 if group == ALONE or not dist.is_initialized() else dist.get_world_size(group)
    )


def rank(group: Group = None) -> int:
    """This process's number; 0 without a process group."""
    return 0 if group == ALONE or not dist.is_initialized() else dist.get_rank(group)


def choose_device(name: str = "") -> torch.device:
    """The named device; by default this rank's GPU, or the CPU if there is none. Raises ValueError
    for one that this machine does not have."""
    if not name:
        if torch.cuda.is_available():
            return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        return torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        devices = ", ".join(["cpu", *gpus])
        raise ValueError(
            f"--device {name} is not there; this machine has {devices}"
        ) from error


def join_ranks(device: torch.device, timeout: float) -> None:
    """Start the process group, as the launcher's variables say; on one host it listens on the
    loopback interface.

    timeout: seconds after which a collective that a rank does not join fails.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    line = (
        "waiting for the other ranks of this launch; "
        "for a run in one process unset RANK and WORLD_SIZE"
    )
    timer = threading.Timer(
        MISSING_SECONDS, print, [line], {"file": sys.stderr, "flush": True}
    )
    timer.daemon = True
    timer.start()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if on_one_host():
            use_loopback()
        number = launch_variable("RANK")
        world = launch_variable("WORLD_SIZE")
        limit = timedelta(seconds=timeout)
        store = own_store(number, world, limit)
        if store is None:
            dist.init_process_group(backend, timeout=limit)
        else:
            dist.init_process_group(
                backend, timeout=limit, store=store, rank=number, world_size=world
            )
    finally:
        timer.cancel()


def launch_variable(name: str) -> int:
    """A number that the launcher has set. Raises ValueError if it has not."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        problem = f"{name} is {value!r}" if value else f"{name} is not set"
        raise ValueError(
            f"{problem}; expected a number from a launcher such as torchrun or deepspeed"
        )
    return int(value)


def on_one_host() -> bool:
    """Whether all ranks of this launch are on this host, as far as its variables say."""
    world = os.environ.get("WORLD_SIZE", "1")
    # how many are on this host, of torchrun and of DeepSpeed's launcher
    local = (os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("LOCAL_SIZE"))
    return (
        world == "1" or world in local or is_loopback(os.environ.get("MASTER_ADDR", ""))
    )


def is_loopback(address: str) -> bool:
    """Whether only this host reaches an address: 127.0.0.1, ::1, localhost."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def use_loopback() -> None:
    """Let Gloo and NCCL, which listen for the other ranks, listen where no other host reaches them.

    What the user has set takes precedence.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def own_store(number: int, world: int, timeout: timedelta) -> dist.Store | None:
    """A store for the process group that other hosts can't reach; None if there are several hosts,
    or if torchrun has started one. Torch's own listens on all interfaces, whatever MASTER_ADDR
    says.

    Raises OSError if the port of MASTER_PORT is in use.
    """
    if world == 1:
        return dist.HashStore()  # in this process's memory
    if not on_one_host() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = launch_variable("MASTER_PORT")
    if number > 0:
        return dist.TCPStore(LOOPBACK, port, world, is_master=False, timeout=timeout)
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise OSError(
            f"cannot listen on port {port}: {error.strerror}; choose another with --master_port"
        ) from error
    descriptor = listener.detach()  # the store closes it
    return dist.TCPStore(
        LOOPBACK,
        port,
        world,
        is_master=True,
        timeout=timeout,
        master_listen_fd=descriptor,
    )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return listener.getsockname()[1]


def set_single_process_environment() -> None:
    """Without a launcher, set what one would set for a single process; ValueError for one of
    several tasks of srun or mpirun, each of which would train alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        for name, launcher in TASKS.items():
            if (tasks := int(os.environ.get(name) or 1)) > 1:
                raise ValueError(
                    f"{launcher} started {tasks} tasks without a launcher "
                    f"({name}={tasks}, RANK is not set); "
                    "start torchrun once per node (docs/scaling.md)"
                )
        port = str(free_port())  # nobody listens on it: own_store needs none
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR=LOOPBACK,
            MASTER_PORT=port,
        )


class StepTimer:
    """Seconds of a step by phase, measured without making the device wait: where one phase ends and
    the next begins, a clock is read, or an event of the GPU recorded."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # phase, and where it begins; "" between steps
        self._marks: list[tuple[str, Any]] = []

    def _mark(self, phase: str) -> None:
        moment: Any
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((phase, moment))

    def start(self) -> None:
        """A step begins, with waiting for its data; this is the timer that ``timed`` reports to."""
        global _active
        _active = self
        self._mark("data")

    def switch(self, phase: str) -> str:
        """Another phase begins, "" as the step ends; returns the one before, "" (nothing is
        measured) between steps."""
        before = self._marks[-1][0] if self._marks else ""
        if before and before != phase:
            self._mark(phase)
        return before

    def lap(self) -> dict[str, float]:
        """Seconds by phase of the mean step since the last call; waits for the device to finish the
        last one."""
        marks = self._marks
        self._marks = []
        if self._on_gpu and marks:
            marks[-1][1].synchronize()
        sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        steps = sum(not phase for phase, _ in marks)
        for (phase, first), (_, last) in itertools.pairwise(marks):
            if phase:
                seconds = (
                    first.elapsed_time(last) / 1000 if self._on_gpu else last - first
                )
                sums[phase] += seconds / steps
        return sums


_active: StepTimer | None = None


class timed(ContextDecorator):  # noqa: N801 - used like a function; a generator would cost twice as much
    """``with timed("backward"):`` the block is this phase of the step; the phase around it is
    interrupted. Also a decorator of a function."""

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
    """(b, ...) on each rank -> (world * b, ...) in order of rank, without gradient. Every rank must
    hold b rows."""
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
    widths = [row.shape[1] for row in rows]
    parts = gather_rows(torch.cat(rows, 1), group).split(widths, 1)
    return [
        part.contiguous().view(local.dtype)
        for part, local in zip(parts, tensors, strict=True)
    ]


def sum_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """Sum in place over ranks; returns ``value``. Its device may be one that the backend cannot
    send from."""
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
    """(world * b, ...) on each rank -> (b, ...), this rank's rows of the sum over ranks: half of a
    sum's traffic."""
    if world_size(group) == 1:
        return values
    rows = len(values) // world_size(group)
    rows_sum = values.new_empty((rows, *values.shape[1:]))
    dist.reduce_scatter_tensor(rows_sum, values.contiguous(), group=group)
    return rows_sum


def gather_to_first(value: Value) -> list[Value]:
    """The value of every rank, in order of rank, on rank 0; [] on the others, which hold no copy.

    For the values that can be exchanged, see ``wire.pack``.
    """
    if world_size() == 1:
        return [value]
    padded, sizes = _padded(value, None)
    parts = [torch.empty_like(padded) for _ in sizes] if rank() == 0 else None
    dist.gather(padded, parts, dst=0)
    return _unpadded(parts or [], sizes)


def gather_objects(value: Value, group: Group = None) -> list[Value]:
    """The (small) value of every rank, in order of rank, on every rank; see ``wire.pack``."""
    if world_size(group) == 1:
        return [value]
    padded, sizes = _padded(value, group)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return _unpadded(parts, sizes)


def broadcast_object(value: Value) -> Value:
    """Rank 0's value on every rank; see ``wire.pack``."""
    if world_size() == 1:
        return value
    if rank() == 0:
        data = _bytes_of(value)
    else:
        data = torch.empty(0, dtype=torch.uint8, device=_sending_device())
    size = torch.tensor([len(data)], device=data.device)
    dist.broadcast(size, src=0)
    if rank() > 0:
        data = data.new_empty(int(size))
    dist.broadcast(data, src=0)
    return unpack(data.cpu().numpy().tobytes())


def _sending_device(group: Group = None) -> torch.device:
    """Where a tensor must be for the group's backend to send it."""
    assert group != ALONE
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _bytes_of(value: object, group: Group = None) -> Tensor:
    """(bytes,) uint8: the packed value, ready to be sent."""
    return torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8).to(
        _sending_device(group)
    )


def _padded(value: object, group: Group) -> tuple[Tensor, list[int]]:
    """The packed value, as long as the longest of all ranks, and the sizes of all ranks' values in
    bytes."""
    data = _bytes_of(value, group)
    size = torch.tensor([len(data)], device=data.device)
    all_sizes = [torch.empty_like(size) for _ in range(world_size(group))]
    dist.all_gather(all_sizes, size, group=group)
    sizes = torch.cat(all_sizes).tolist()
    padded = data.new_zeros(max(sizes))
    padded[: len(data)] = data
    return padded, sizes


def _unpadded(parts: list[Tensor], sizes: list[int]) -> list[Any]:
    """The values of padded parts; none if there are none."""
    values = []
    for part, size in zip(parts, sizes, strict=False):
        data = part[:size].cpu().numpy().tobytes()
        values.append(unpack(data))
    return values


# of on_first_rank and leaving_together: the same on every rank
_turns = itertools.count()


def on_first_rank(work: Callable[[], Value]) -> Value:
    """Call ``work`` on rank 0 alone; returns its (small) result on every rank, which all must call
    this.

    The others wait in no collective, so ``work`` may take hours, whatever the group's timeout. If
    it raises ValueError or OSError, they raise FirstRankError. For the results that can be sent,
    see ``wire.pack``.
    """
    if world_size() == 1:
        return work()
    store, key = _turn()
    if rank() == 0:
        try:
            result = work()
            error = None
        except (ValueError, OSError) as raised:
            result = None
            error = raised
        answer = pack([result, None if error is None else str(error)])
        store.set(key, answer)  # pyright: ignore[reportArgumentType]
        # rank 0 may host the store: if it ended now, the others would not get the answer
        others = world_size() - 1
        limit = math.inf if error is None else 30.0
        _poll(lambda: store.add(f"{key}/read", 0) == others, limit=limit)
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]
    _poll(lambda: store.check([key]))
    result, message = unpack(store.get(key))
    store.add(f"{key}/read", 1)
    if message is not None:
        raise FirstRankError(message)
    return result


@contextmanager
def leaving_together() -> Iterator[None]:
    """Every rank enters the block, and none leaves it before all are at its end; no collective
    limits their time."""
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
    """A name of this process group. torchrun's store outlives a restart, with the answers of the
    ranks before it."""
    return broadcast_object(uuid.uuid4().hex)


def _poll(ready: Callable[[], bool], *, limit: float = math.inf) -> None:
    """Wait until ``ready``, at most ``limit`` seconds, so that signals are still handled."""
    pause = 0.005
    deadline = time.monotonic() + limit
    while not ready() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def set_tf32(tf32: Tf32, precision: str, device: torch.device) -> None:
    """Allow or forbid TF32, with 10 bits of mantissa, in products and convolutions of fp32 tensors
    on a GPU; auto: where the features come from half precision anyway, whose 7 or 10 bits round as
    much."""
    if device.type == "cuda":
        allowed = tf32 == "on" or (tf32 == "auto" and precision != "fp32")
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
