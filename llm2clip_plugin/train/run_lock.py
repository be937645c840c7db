"""One training at a time in a run folder: ``run.lock``, held by rank 0, says who.

The lock is the kernel's (fcntl), so it ends with the process that holds it, however that ends; NFS and Lustre pass it
on to other hosts. It is not inherited by loader workers, which may outlive a killed rank.
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
from pathlib import Path
from typing import Any

import psutil  # comes with DeepSpeed

from llm2clip_plugin.run_files import LOCK
from llm2clip_plugin.train.distributed import on_first_rank, rank

LEASE = 100.0  # seconds that an NFS server may keep the lock of a host that is gone; NFSv4's own limit is 90
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


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
            (folder / LOCK).unlink(missing_ok=True)  # before the lock ends, so never the next holder's
            os.close(descriptor)
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
            if _lock(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        holder = _holder(path)
        if holder.get("host") == socket.gethostname() or time.monotonic() > deadline:
            raise FileExistsError(
                f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')} ({path}): wait for its "
                f"end, stop it, or choose another --output. If that host is down, delete {path}"
            )
        if holder and not reported:
            print(f"{folder} is locked from {holder['host']}; waiting up to {patience:.0f} s", file=sys.stderr)
            reported = True
        time.sleep(0.2)  # without a holder: another process is just starting or ending


def _lock(descriptor: int, path: Path) -> bool:
    """Lock and sign the file; False if another process holds it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: the file system of {path} has no locks: start only one run in this folder", file=sys.stderr)
    if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
        return False  # its holder removed it meanwhile
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(me).encode(), 0)
    os.fsync(descriptor)
    return True


def _holder(path: Path) -> dict[str, Any]:
    """Host, pid and start of the process that the file names; {} for an empty or damaged one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
