"""What keeps ranks from hanging and from training on different things: a watch over all of them, facts that are
compared before the first step, one run in a folder, weights that are finite.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

import llm2clip_plugin.console as phases
from llm2clip_plugin.contracts import sha256_file
from llm2clip_plugin.files import LOCK
from llm2clip_plugin.train.config import DDP_TIMEOUT, STRAGGLER_SECONDS
from llm2clip_plugin.train.distributed import (
    barrier,
    broadcast_object,
    choose_device,
    gather_objects,
    join_ranks,
    on_first_rank,
    rank,
    world_size,
)
from llm2clip_plugin.train.errors import (
    DisagreementError,
    FirstRankError,
    RankFailedError,
    SameOnAllRanksError,
    StoppedError,
    lost_rank,
)

NAMED = 4  # late ranks that name themselves
GRACE = 10.0  # seconds in which a rank may end by itself after another has failed
TO_WRITE = 60.0  # seconds more while it completes a checkpoint, which is worth minutes of all ranks
SLOWEST_BEAT = 5.0  # seconds between signs of life, at most
WAITING_IN = ("/torch/distributed/", "/deepspeed/comm/")  # files whose frames wait for other ranks
WAITING_FUNCTIONS = ("_poll",)  # of this package, which do so, too
SEEN_WITHIN = 5.0  # seconds after which a file written on one host must be visible on the others
LISTED = 12  # differing facts that a message lists
LEASE = 100.0  # seconds that an NFS server may keep the lock of a host that is gone; NFSv4's own limit is 90
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

Facts = Mapping[str, str]  # what is compared -> this rank's value


def watched(*, straggler_seconds: float, timeout: float) -> AbstractContextManager[None]:
    """Watch the ranks inside the block, which every rank must enter; nothing happens with one rank.

    straggler_seconds: a rank that makes no progress for so long is named; 0: never. timeout: after so many seconds
    without a sign of life of one rank, all end with exit status 1. An exception that leaves the block ends all ranks;
    where it was only the consequence of another rank's, it becomes a RankFailedError that names that one.
    """
    return Watch(straggler_seconds=straggler_seconds, timeout=timeout) if world_size() > 1 else nullcontext()


@contextmanager
def watched_group() -> Iterator[tuple[int, int]]:
    """(rank, world size) of the launcher's processes, which form a group and watch each other inside the block; (0, 1)
    of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    join_ranks(choose_device(), DDP_TIMEOUT)
    try:
        with watched(straggler_seconds=STRAGGLER_SECONDS, timeout=DDP_TIMEOUT):
            yield rank(), world_size()
    finally:
        dist.destroy_process_group()


class Watch(AbstractContextManager[None]):
    """Two threads of a rank, which end with it, while its main thread is inside of the block.

    Every rank sends a sign of life every few seconds through the process group's store. Rank 0 names ranks that send
    none, rank 1 names rank 0; a rank that makes no progress names itself. One thread talks to the store and may be
    blocked by it (rank 0 can host it, and be stopped), the other looks at what the first has read.

    An error ends all ranks on NCCL, too, where the others wait in a kernel that no exception and no signal handler
    reaches: their watch reads it from the store and ends the process without asking its main thread.
    """

    def __init__(self, *, straggler_seconds: float, timeout: float) -> None:
        self.straggler_seconds, self.timeout = straggler_seconds, timeout
        self.interval = max(0.2, min(SLOWEST_BEAT, (straggler_seconds or timeout) / 5))
        self.rank, self.world = rank(), world_size()
        self.others: dict[int, dict[str, Any]] = {}  # the latest signs of life of those that this rank watches
        self._heard: dict[int, float] = {}  # when those came
        self._told: dict[int, float] = {}  # seconds of silence that were reported
        self.answered = time.monotonic()  # when the store last answered
        self._gone = math.inf  # since when it has refused connections
        self.failure = ""  # of another rank, as it published it
        self._found = ""  # a failure that this rank has seen first, to be published
        self.deadline = math.inf  # when this process ends, whatever its main thread does
        self._late_told = (0, 0.0)  # number of a phase, seconds of lateness in it that were reported
        self._main = threading.get_ident()
        self._stopped = threading.Event()

    def __enter__(self) -> None:
        # a store of its own: a blocked request of one client blocks the client's other requests
        store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.store = dist.PrefixStore(f"llm2clip/watch/{broadcast_object(os.urandom(6).hex())}", store)
        self.store.set_timeout(timedelta(seconds=30))
        self.store.set(f"beat/{self.rank}", json.dumps(self._beat()))
        barrier()  # all beats are there
        # rank 0 watches all, rank 1 watches rank 0
        self._watched = range(1, self.world) if self.rank == 0 else [0] if self.rank == 1 else []
        self._read_beats()
        for work in (self._talk, self._look):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        other = ""  # what to say instead of an error that follows from another rank's
        if error is not None and not isinstance(error, StoppedError):
            self._end_within_grace()
            if not isinstance(error, (SameOnAllRanksError, FirstRankError)):
                other = self._publish(error)
        if self.deadline == math.inf:  # else this process is to end
            self._stopped.set()
        if other:
            raise RankFailedError(other) from error

    def _publish(self, error: BaseException) -> str:
        """Tell this rank's error to the others; returns another rank's if that is the cause."""
        if isinstance(error, RuntimeError) and lost_rank(error):
            until = time.monotonic() + 3.0  # in which the other rank publishes its error
            while not self.failure and time.monotonic() < until:
                with suppress(RuntimeError):  # the store's host may be gone
                    self._read_failure()
                time.sleep(0.1)
            return self.failure
        name = f"rank {self.rank} on {socket.gethostname()} failed in phase {_doing()}"
        with suppress(Exception):  # the store's host may be gone
            self.store.set("failed", f"{name}: {type(error).__name__}: {error}")
        return ""

    def _end_within_grace(self) -> None:
        self.deadline = min(self.deadline, time.monotonic() + GRACE)

    def _beat(self) -> dict[str, Any]:
        now = phases.current()
        frame = sys._current_frames().get(self._main)  # none while the interpreter ends; NCCL's kernels are not seen
        code = frame.f_code if frame else None
        waits = code and (code.co_name in WAITING_FUNCTIONS or any(part in code.co_filename for part in WAITING_IN))
        beat = {"host": socket.gethostname(), "pid": os.getpid(), "phase": _doing(), "waits": bool(waits)}
        return {**beat, "number": now.number, "seconds": time.monotonic() - now.since}  # no two beats are equal

    def _beats_of(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        found = self.store.multi_get([f"beat/{number}" for number in ranks]) if ranks else []
        return dict(zip(ranks, map(json.loads, found), strict=True))

    def _read_beats(self) -> None:
        for number, beat in self._beats_of(self._watched).items():
            if beat != self.others.get(number):
                self.others[number], self._heard[number] = beat, time.monotonic()

    def _read_failure(self) -> None:
        if not self.failure and self.store.check(["failed"]):
            self.failure = self.store.get("failed").decode()

    def _talk(self) -> None:  # may block for long
        while not self._stopped.wait(self.interval):
            try:
                beat = self._beat()
                self.store.set(f"beat/{self.rank}", json.dumps(beat))
                self._read_beats()
                if self._found:
                    self.store.set("failed", self._found)
                self._read_failure()
                if self.straggler_seconds and not self.failure:
                    self._name_if_late(beat)
                self.answered, self._gone = time.monotonic(), math.inf
            except dist.DistNetworkError:
                self._gone = min(self._gone, time.monotonic())
            except dist.DistStoreError:  # it is slow, or its process is stopped: `answered` stays old
                continue

    def _look(self) -> None:
        """Name silent ranks, end this process if it must end."""
        checked_at = time.monotonic()
        while not self._stopped.wait(self.interval / 2):
            now = time.monotonic()
            if now - checked_at > self.interval + 1:  # this process itself was stopped: what it knows is old
                self.answered = now
                self._heard.update(dict.fromkeys(self._heard, now))
            checked_at = now
            self._end_if_due(now)
            if self.straggler_seconds and not self.failure:
                self._name_silent(now)

    def _end_if_due(self, now: float) -> None:
        silent = [number for number in self.others if now - self._heard[number] > self.timeout]
        if self.failure:
            pass
        elif silent:
            name, silence = self._name(silent[0]), now - self._heard[silent[0]]
            self.failure = self._found = f"{name} has sent no sign of life for {silence:.0f} s"
        elif now - self.answered > self.timeout:
            self.failure = f"the store of the process group has not answered for {now - self.answered:.0f} s"
        elif now - self._gone > GRACE:
            self.failure = "the process that holds the group's store (rank 0, or torchrun on its host) has ended"
        if self.failure and self.deadline == math.inf:
            self._end_within_grace()
            if self.rank == 0 or (self.rank == 1 and silent):
                _say(f"{self.failure}; ending all ranks")
        if now > self.deadline + (TO_WRITE if phases.current().name == phases.CHECKPOINT else 0.0):
            sys.stderr.flush()
            os._exit(1)

    def _name(self, number: int) -> str:
        return f"rank {number} ({self.others[number]['host']}, pid {self.others[number]['pid']})"

    def _name_silent(self, now: float) -> None:
        limit = max(self.straggler_seconds, 3 * self.interval)
        for number, beat in self.others.items():
            silence, told = now - self._heard[number], self._told.get(number, 0.0)
            if silence > max(limit, 2 * told):
                self._told[number] = silence
                phase = beat["phase"]
                _say(f"late: {self._name(number)} has sent no sign of life for {silence:.0f} s, since phase {phase}")
            elif silence < limit:
                self._told[number] = 0.0

    def _name_if_late(self, own: dict[str, Any]) -> None:
        """Say where this rank is if it runs, but makes no progress and waits for nobody; of several such ranks, those
        that are furthest behind do."""
        phase, told = self._late_told
        seconds, limit = own["seconds"], self.straggler_seconds
        if own["waits"] or seconds <= max(limit, 2 * told if phase == own["number"] else 0.0):
            return
        beats = self._beats_of(range(self.world)).items()
        stuck = {number: beat for number, beat in beats if beat["seconds"] > limit and not beat["waits"]}
        behind = min(beat["number"] for beat in stuck.values())
        if self.rank in [number for number, beat in stuck.items() if beat["number"] == behind][:NAMED]:
            self._late_told = own["number"], seconds
            stack = "".join(traceback.format_stack(sys._current_frames().get(self._main)))
            _say(
                f"late: rank {self.rank} ({own['host']}, pid {own['pid']}) has been in phase {own['phase']} for "
                f"{seconds:.0f} s; its main thread:\n{stack}"
            )


def _doing() -> str:
    now = phases.current()
    return now.name + (f" of step {now.step}" if now.step else "")


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)  # apart from a progress bar's line


def refuse_disagreement(facts: Facts, advice: Mapping[str, str]) -> None:
    """Compare what all ranks must have in common before the first step; every rank must call this. Raises
    DisagreementError on every rank. ``advice``: the first word of a fact -> what to do if it differs."""
    ranks = gather_objects((socket.gethostname(), dict(facts)))
    names = dict.fromkeys(name for _, facts in ranks for name in facts)
    differing = [name for name in names if len({facts.get(name) for _, facts in ranks}) > 1]
    if not differing:
        return
    lines, advised = ["the ranks disagree before the first step:"], set()
    for name in differing[:LISTED]:
        holders: dict[tuple[str, str], list[str]] = {}  # value and host -> ranks
        for number, (host, facts) in enumerate(ranks):
            holders.setdefault((facts.get(name, "absent"), host), []).append(str(number))
        groups = [f"{value} on {host} (ranks {', '.join(own)})" for (value, host), own in holders.items()]
        lines.append(f"  {name}: {'; '.join(groups)}")
        advised.add(advice.get(name.split()[0], ""))
    if len(differing) > LISTED:
        lines.append(f"  and {len(differing) - LISTED} more")
    raise DisagreementError("\n".join([*lines, *sorted(advised - {""})]))


def shared_folder(folder: Path) -> str:
    """Whether this rank sees what rank 0 writes into ``folder``, which is ``locked``, as a fact; every rank must call
    this."""
    if world_size() == 1:
        return "shared"
    file = folder / broadcast_object(f".shared-{uuid.uuid4().hex[:12]}")
    on_first_rank(file.touch)
    seen = _appears(file)
    gather_objects(seen)  # all have looked
    if rank() == 0:
        file.unlink(missing_ok=True)
    return "shared with rank 0" if seen else f"{folder.absolute()} lacks a file that rank 0 has just written"


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
    sizes = [f"{file.name} {file.stat().st_size} bytes" for file in sorted(path.glob("*.safetensors"))]
    return f"{path.name} {sha256_file(path / state_file)[:12]}, {', '.join(sizes)}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created (and removed if it stays empty), inside the block; every rank
    must enter it. Raises OSError on every rank if another process trains in the folder, or it cannot be written.

    The lock is the kernel's (fcntl): it ends with rank 0, loader workers do not inherit it, NFS and Lustre pass it on
    to other hosts. ``run.lock`` says who holds it.
    """
    held: list[tuple[bool, int]] = []
    on_first_rank(lambda: held.append((folder.exists(), acquire(folder))))
    try:
        yield
    finally:
        if rank() == 0:
            existed, descriptor = held.pop()
            (folder / LOCK).unlink(missing_ok=True)  # before the lock ends, so never the next holder's
            os.close(descriptor)
            if not existed:
                with suppress(OSError):  # what it holds stays
                    folder.rmdir()


def acquire(folder: Path) -> int:
    """Take and sign the lock, after waiting for another host's; returns its open descriptor. Raises OSError."""
    path, deadline, reported = folder / LOCK, time.monotonic() + LEASE, False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # each time: a refused run removes the folder that it made
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"cannot write in --output {folder}: {error.strerror}; choose another folder") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, *NO_LOCKS):
                raise
            if locks := error.errno in NO_LOCKS:
                print(f"warning: {folder} is on a disk without locks: start only one run in it", file=sys.stderr)
        if locks and path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:  # not removed meanwhile
            me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
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
            raise FileExistsError(
                f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')} ({path}): wait for its "
                f"end, stop it, or choose another --output. If that host is down, delete {path}"
            )
        if holder and not reported:
            print(f"{folder} is locked from {holder['host']}; waiting up to {LEASE:.0f} s", file=sys.stderr)
            reported = True
        time.sleep(0.2)


def check_finite(module: nn.Module, where: str | os.PathLike[str]) -> None:
    """Raise ValueError naming the first tensor of a module with a NaN or an infinity; ``where``: what it was read
    from."""
    for name, value in module.state_dict().items():
        # NaN in both ends if there is one; isfinite of all takes 17 times as long
        if value.is_floating_point() and value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(f"{where}: {bad} of the {value.numel()} values of {name} are NaN or infinite; restore it")
