"""What keeps ranks from hanging and from training on different things: a watch over all of them,
facts that are compared before the first step, one run in a folder, weights that are finite.
"""

import errno
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn

from llm2clip_plugin import progress
from llm2clip_plugin.errors import (
    DisagreementError,
    FirstRankError,
    RankFailedError,
    SameOnAllRanksError,
    StoppedError,
    lost_rank,
)
from llm2clip_plugin.hashes import sha256_file
from llm2clip_plugin.run_folder import LOCK
from llm2clip_plugin.train.config import DDP_TIMEOUT, STRAGGLER_SECONDS
from llm2clip_plugin.train.distributed import (
    broadcast_object,
    choose_device,
    gather_objects,
    join_ranks,
    on_first_rank,
    rank,
    world_size,
)

NAMED = 4  # late ranks that name themselves
GRACE = 10.0  # seconds in which a rank may end by itself after another has failed
TO_WRITE = 60.0  # seconds more while it completes a checkpoint, which is worth minutes of all ranks
SLOWEST_LOOK = 5.0  # seconds between looks, at most
LEFT = -(1 << 40)  # added to the beats of a rank that leaves
# files whose frames wait for other ranks
WAITING_IN = (
    "/torch/distributed/",
    "/deepspeed/comm/",
)
WAITING_FUNCTIONS = ("_poll",)  # of this package, which do so, too
# seconds after which a file written on one host must be visible on the others
SEEN_WITHIN = 5.0
LISTED = 12  # differing facts that a message lists
# seconds that an NFS server may keep the lock of a host that is gone; NFSv4's own limit is 90
LEASE = 100.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

Facts = Mapping[str, str]  # what is compared -> this rank's value


@contextmanager
def watched_group() -> Iterator[tuple[int, int]]:
    """(rank, world size) of the launcher's processes, which watch each other in the block; (0, 1)
    of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    join_ranks(choose_device(), DDP_TIMEOUT)
    try:
        with Watch(STRAGGLER_SECONDS):
            yield rank(), world_size()
    finally:
        dist.destroy_process_group()


class Watch(AbstractContextManager[None]):
    """A thread of a rank, which ends with it, while its main thread is inside of the block; each
    rank must enter it.

    It names this rank if it makes no progress, and reads the errors of the others from the process
    group's store. An exception that leaves the block ends all ranks, on NCCL, too, where they wait
    in a kernel that no exception and no signal handler reaches; where it was only the consequence
    of another rank's, it becomes a RankFailedError.
    """

    def __init__(self, straggler_seconds: float) -> None:
        """straggler_seconds: without progress, after which a rank is named; 0: never."""
        self.straggler_seconds = straggler_seconds
        self.interval = max(
            0.2, min(SLOWEST_LOOK, straggler_seconds / 5 or SLOWEST_LOOK)
        )
        self.failure = ""  # of another rank, as it published it
        self._reported = ""  # the lateness that was reported last
        # rank -> its last beat, and when it was new
        self._beats: dict[int, tuple[int, float]] = {}
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._stopped = threading.Event()

    def __enter__(self) -> None:
        if world_size() == 1:
            return
        # a store of its own: a blocked request of one client blocks the client's other requests
        store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.store = dist.PrefixStore(
            f"llm2clip/watch/{broadcast_object(os.urandom(6).hex())}", store
        )
        self.store.set_timeout(timedelta(seconds=30))
        self.store.set(f"name/{rank()}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: object
    ) -> None:
        self._stopped.set()
        # a process that ends while it writes leaves half a record in a FileStore
        if self._thread.is_alive():
            self._thread.join(GRACE)
        if error is None or isinstance(error, StoppedError) or world_size() == 1:
            return
        _end_within_grace()
        if isinstance(error, (SameOnAllRanksError, FirstRankError)):
            return
        lost = isinstance(error, RuntimeError) and lost_rank(error)
        until = time.monotonic() + 3.0
        with suppress(Exception):  # the store's host may be gone
            # the rank that is the cause publishes it
            while lost and not self.failure and time.monotonic() < until:
                time.sleep(0.1)
                self._read_failure()
            # a rank that hangs outside of collectives learns from it, too
            if not (lost and self.failure):
                name = f"rank {rank()} on {socket.gethostname()} failed in phase {_doing()}"
                self.store.set("failed", f"{name}: {type(error).__name__}: {error}")
        if lost and self.failure:  # instead of an error that follows from it
            raise RankFailedError(self.failure) from error

    def _read_failure(self) -> None:
        if not self.failure and self.store.check(["failed"]):
            self.failure = self.store.get("failed").decode()

    def _watch(self) -> None:
        gone = math.inf  # since when the store has refused connections
        while not self.failure and not self._stopped.wait(self.interval):
            try:
                self.store.add(f"beat/{rank()}", 1)
                self._name_silent()
                self._name_if_late()
                self._read_failure()
                gone = math.inf
            except dist.DistNetworkError:
                gone = min(gone, time.monotonic())
                if time.monotonic() - gone > GRACE:
                    self.failure = (
                        "the process that holds the ranks' store (rank 0, or torchrun on its host) "
                        "has ended"
                    )
            except dist.DistStoreError:  # it is slow, or its process is stopped
                continue
        with suppress(Exception):
            self.store.add(f"beat/{rank()}", LEFT)
        if self.failure and not self._stopped.is_set():
            if rank() == 0:
                print(
                    f"\n{self.failure}; ending all ranks", file=sys.stderr, flush=True
                )
            _end_within_grace()

    def _name_silent(self) -> None:
        """Name ranks whose watch has stopped, so that they cannot name themselves: rank 0 all
        others, rank 1 rank 0."""
        watched: Sequence[int] = ()
        if self.straggler_seconds and rank() == 0:
            watched = range(1, world_size())
        elif self.straggler_seconds and rank() == 1:
            watched = [0]
        for other in watched:
            beat = self.store.add(f"beat/{other}", 0)
            now = time.monotonic()
            last, since = self._beats.get(other, (-1, now))
            if beat != last:
                self._beats[other] = beat, now
            elif beat >= 0 and now - since > self.straggler_seconds:
                self._beats[other] = beat, math.inf  # said once, until it is back
                name = self.store.get(f"name/{other}").decode()
                print(
                    f"\nsilent: rank {other} ({name}) for {now - since:.0f} s: "
                    "it is stopped or starved, or its host is gone",
                    file=sys.stderr,
                    flush=True,
                )

    def _name_if_late(self) -> None:
        """Say where this rank is if it runs, but makes no progress and waits for nobody; again
        whenever its lateness has doubled. On GPUs the others may wait in kernels, which looks the
        same: of a phase a few say so."""
        # no frame while the interpreter ends
        now = progress.current()
        frame = sys._current_frames().get(self._main)
        seconds = time.monotonic() - now.since
        if frame is None or not 0 < self.straggler_seconds < seconds:
            return
        code = frame.f_code
        late = f"late/{now.number}/{int(math.log2(seconds / self.straggler_seconds))}"
        in_waiting_file = any(part in code.co_filename for part in WAITING_IN)
        waits = in_waiting_file or code.co_name in WAITING_FUNCTIONS
        if not waits and late != self._reported:
            self._reported = late
            if self.store.add(late, 1) <= NAMED:
                who = f"rank {rank()} ({socket.gethostname()}, pid {os.getpid()})"
                stack = "".join(traceback.format_stack(frame))
                print(
                    f"\nlate: {who} has been in phase {_doing()} for {seconds:.0f} s; "
                    f"its main thread:\n{stack}",
                    file=sys.stderr,
                    flush=True,
                )


def _end_within_grace() -> None:
    """End this process in a while, whatever its main thread does; a checkpoint may be completed
    before."""

    def end() -> None:
        time.sleep(GRACE)
        deadline = time.monotonic() + TO_WRITE
        while (
            progress.current().name == progress.CHECKPOINT
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _doing() -> str:
    now = progress.current()
    return now.name + (f" of step {now.step}" if now.step else "")


def refuse_disagreement(facts: Facts, advice: Mapping[str, str]) -> None:
    """Compare what all ranks must have in common before the first step; every rank must call this.
    Raises DisagreementError on every rank. ``advice``: the first word of a fact -> what to do if it
    differs."""
    ranks = gather_objects((socket.gethostname(), dict(facts)))
    names = dict.fromkeys(name for _, facts in ranks for name in facts)

    def differs(name: str) -> bool:
        return len({facts.get(name) for _, facts in ranks}) > 1

    differing = [name for name in names if differs(name)]
    if not differing:
        return
    lines = ["the ranks disagree before the first step:"]
    advised = set()
    for name in differing[:LISTED]:
        holders: dict[tuple[str, str], list[str]] = {}  # value and host -> ranks
        for number, (host, facts) in enumerate(ranks):
            value = facts.get(name, "absent")
            holders.setdefault((value, host), []).append(str(number))
        groups = [
            f"{value} on {host} (ranks {', '.join(numbers)})"
            for (value, host), numbers in holders.items()
        ]
        lines.append(f"  {name}: {'; '.join(groups)}")
        advised.add(advice.get(name.split()[0], ""))
    raise DisagreementError("\n".join([*lines, *sorted(advised - {""})]))


def shared_folder(folder: Path) -> str:
    """Whether this rank sees what rank 0 writes into ``folder``, which is ``locked``, as a fact;
    every rank must call this."""
    if world_size() == 1:
        return "shared"
    file = folder / broadcast_object(f".shared-{uuid.uuid4().hex[:12]}")
    on_first_rank(file.touch)
    seen = _appears(file)
    gather_objects(seen)  # all have looked
    if rank() == 0:
        file.unlink(missing_ok=True)
    if not seen:
        return f"{folder.absolute()} lacks a file that rank 0 has just written"
    return "shared with rank 0"


def _appears(path: Path) -> bool:
    """Whether a file is there, or appears while an NFS client refreshes its view of the folder."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def readable_checkpoint(path: Path, state_file: str) -> str:
    """A checkpoint as this rank reads it: the digest of its state, and the sizes of its files."""
    if not _appears(path / state_file):
        return f"{path.name} is missing"
    files = sorted(path.glob("*.safetensors"))
    sizes = ", ".join(f"{file.name} {file.stat().st_size} bytes" for file in files)
    digest = sha256_file(path / state_file)[:12]
    return f"{path.name} {digest}, {sizes}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created, inside the block; every rank must enter it.
    Raises OSError on every rank if another process trains in the folder, or it cannot be written.

    The lock is the kernel's (fcntl): it ends with rank 0, loader workers do not inherit it, NFS and
    Lustre pass it on to other hosts. ``run.lock`` says who holds it.
    """
    held: list[int] = []
    on_first_rank(lambda: held.append(acquire(folder)))
    try:
        yield
    finally:
        if rank() == 0:
            # before the lock ends, so never the next holder's
            (folder / LOCK).unlink(missing_ok=True)
            os.close(held.pop())


def acquire(folder: Path) -> int:
    """Take and sign the lock, after waiting for another host's; returns its open descriptor. Raises
    OSError."""
    path = folder / LOCK
    deadline = time.monotonic() + LEASE
    announced = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not removed meanwhile
            taken = path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(
                    f"warning: {folder} is on a disk without locks: start only one run in it",
                    file=sys.stderr,
                )
            elif error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            taken = error.errno in NO_LOCKS
        if taken:
            me = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": psutil.Process().create_time(),
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
            os.fsync(descriptor)
            return descriptor
        os.close(descriptor)
        try:
            holder = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            holder = {}  # another process is just starting or ending
        if holder.get("host") == socket.gethostname() or time.monotonic() > deadline:
            user = f"process {holder.get('pid')} on {holder.get('host')}"
            raise FileExistsError(
                f"{folder} is in use by {user} ({path}): wait for its end, stop it, or choose "
                f"another --output. If that host is down, delete {path}"
            )
        if holder and not announced:
            announced = True
            print(
                f"{folder} is locked from {holder['host']}; waiting up to {LEASE:.0f} s",
                file=sys.stderr,
            )
        time.sleep(0.2)


def check_finite(module: nn.Module, where: str | os.PathLike[str]) -> None:
    """Raise ValueError naming the first tensor of a module with a NaN or an infinity; ``where``:
    what it was read from."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or not value.numel():
            continue
        # NaN in both ends if there is one; isfinite of all takes 17 times as long
        ends = torch.stack(torch.aminmax(value))
        if not ends.isfinite().all():
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"{where}: {bad} of the {value.numel()} values of {name} are NaN or infinite; "
                "restore it"
            )
