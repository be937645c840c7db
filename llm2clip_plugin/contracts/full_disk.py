"""A full disk as one error that names the file and the free space, whichever library met it."""

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
        path = Path(os.path.abspath(target))
        folder = next(place for place in (path, *path.parents) if place.exists())
        self.reason = f"{self.strerror} ({size_text(shutil.disk_usage(folder).free)} free)"

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.reason}; free space there, and rerun the same command"

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:  # processes send it to each other
        return type(self), (self.filename, self.errno)


@contextmanager
def naming_full_disk(target: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskFullError for ``target`` if the block fails because its disk is full: safetensors has its own error."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or any(os.strerror(full) in str(error) for full in FULL):
            raise DiskFullError(target, number if number in FULL else errno.ENOSPC) from error
        raise


def size_text(number: float) -> str:
    """Bytes for people: ``1.50 GB``, ``0.21 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"
