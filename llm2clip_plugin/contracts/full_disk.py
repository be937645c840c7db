"""A full disk as one error that names the file, the disk and its free space, whichever library met it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """No space is left, or a quota is used up, where a file is written."""

    def __init__(self, target: str | os.PathLike[str], number: int = errno.ENOSPC) -> None:
        super().__init__(number, os.strerror(number), os.fspath(target))
        disk = mount_point(Path(target))
        self.reason = f"{self.strerror} (the disk at {disk} has {size_text(shutil.disk_usage(disk).free)} free)"

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename}: {self.reason}; free space there, or choose a path on another disk, and "
            "rerun the same command"
        )

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:  # processes send it to each other
        return type(self), (self.filename, self.errno)


@contextmanager
def naming_full_disk(target: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskFullError for ``target`` if the block fails because its disk is full.

    safetensors has an error of its own for that; any other of its errors becomes an OSError that names ``target``.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or any(os.strerror(full) in str(error) for full in FULL):
            raise DiskFullError(target, number if number in FULL else errno.ENOSPC) from error
        if type(error).__name__ == "SafetensorError":  # this file imports the standard library alone
            raise OSError(f"cannot write {target}: {error}") from error
        raise


def remedy_of(error: Exception) -> str:
    """What to do if a disk is full, or descriptors are used up, and the error does not say so itself; else ""."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "; raise the limit of open files, as in `ulimit -n 4096`, and rerun the same command"
    if isinstance(error, DiskFullError) or not (isinstance(error, OSError) and error.errno in FULL):
        return ""
    return "; free space on the disks of the output and of temporary files (TMPDIR), and rerun the same command"


def mount_point(path: Path) -> Path:
    """Where the disk that holds, or would hold, ``path`` is mounted."""
    path = Path(os.path.abspath(path))
    while not os.path.ismount(path):
        path = path.parent
    return path


def size_text(number: float) -> str:
    """Bytes for people: ``1.50 GB``, ``0.21 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"
