"""One training at a time in a run folder: ``run.lock``, held by rank 0, says who.

The lock is the kernel's (fcntl), so it ends with the process that holds it, however that ends; NFS and Lustre pass it
on to other hosts. It is not inherited by loader workers, which may outlive a killed rank. Where a file system has no
locks, the file's content decides: a living process of this host is refused, another host only warned about, because a
requeued job on another node must be able to continue.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # comes with DeepSpeed

from llm2clip_plugin.run_files import LOCK
from llm2clip_plugin.train.distributed import on_first_rank, rank

LEASE = 100.0  # seconds that an NFS server may keep the lock of a host that is gone; NFSv4's own limit is 90
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of ``run.lock``."""

    host: str
    pid: int
    started: float  # of the process, in seconds since the epoch: a pid is used again

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {since}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created, inside the block; every rank must enter it. A folder that was
    created here and is empty at the end is removed.

    Raises OSError on every rank if another process trains in the folder, or if it cannot be written.
    """
    held: list[tuple[bool, int]] = []
    on_first_rank(lambda: held.append((folder.exists(), acquire(folder))))
    try:
        yield
    finally:
        if rank() == 0:
            existed, descriptor = held.pop()
            release(folder, descriptor)
            if not existed:
                with suppress(OSError):  # what it holds stays
                    folder.rmdir()


def acquire(folder: Path, *, patience: float = LEASE) -> int:
    """Take the lock; returns its open descriptor. Raises OSError. patience: seconds to wait for another host's."""
    path, deadline, reported = folder / LOCK, time.monotonic() + patience, False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # each time: a refused run removes the folder that it made
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, NotADirectoryError) as error:
            raise FileExistsError(f"--output {folder} is a file, or below one; choose a folder") from error
        except OSError as error:
            raise OSError(f"cannot write in --output {folder}: {error.strerror}") from error
        try:
            return _lock(descriptor, path)
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        same_host = holder is not None and holder.host == socket.gethostname()
        if same_host or time.monotonic() > deadline:
            raise FileExistsError(
                f"{folder} is in use by {holder or 'another process'} ({path}): wait for its end, stop it, or choose "
                f"another --output. If that host is down, delete {path}"
            )
        if holder is not None and not reported:
            print(f"{folder} is locked by {holder}; waiting up to {patience:.0f} s for that host", file=sys.stderr)
            reported = True
        time.sleep(0.2)  # without a holder: another process is just starting or ending


def release(folder: Path, descriptor: int) -> None:
    """Give the lock back and remove its file."""
    (folder / LOCK).unlink(missing_ok=True)  # before the lock ends, so never the next holder's
    os.close(descriptor)


def _lock(descriptor: int, path: Path) -> int:
    """Lock and sign the file; BlockingIOError if another process holds it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error
        if error.errno not in NO_LOCKS:
            raise
        _check_holder(path)
    if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
        raise BlockingIOError  # its holder removed it meanwhile
    me = Holder(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time())
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(me)).encode(), 0)
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(f"cannot write in --output {path.parent}: {error.strerror}") from error
    return descriptor


def _check_holder(path: Path) -> None:
    """Without locks: BlockingIOError if the file names a living process of this host, a warning for another host."""
    holder = _holder(path)
    if holder is None:
        return
    if holder.host != socket.gethostname():
        print(
            f"warning: {path} names {holder}, and this file system has no locks: make sure that it has ended",
            file=sys.stderr,
        )
        return
    try:
        alive = abs(psutil.Process(holder.pid).create_time() - holder.started) < 1
    except psutil.NoSuchProcess:
        return
    if alive and holder.pid != os.getpid():
        raise BlockingIOError


def _holder(path: Path) -> Holder | None:
    """Who the file names; None for an empty or damaged one."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
