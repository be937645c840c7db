"""Files and folders that appear whole or not at all, and an error that names a full disk. Standard
library only.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_EMPTY = (
    errno.ENOTEMPTY,
    errno.EEXIST,
)  # of a directory that another is renamed onto


class DiskFullError(OSError):
    """No space is left, or a quota is used up, where a file is written."""

    def __init__(
        self, target: str | os.PathLike[str], number: int = errno.ENOSPC
    ) -> None:
        super().__init__(number, os.strerror(number), os.fspath(target))
        path = Path(os.path.abspath(target))
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        self.reason = (
            f"{self.strerror} ({size_text(shutil.disk_usage(folder).free)} free)"
        )

    def __str__(self) -> str:
        return (
            f"cannot write {self.filename}: {self.reason}; free space there, and rerun the same "
            "command"
        )

    def __reduce__(
        self,
    ) -> tuple[type, tuple[str, int | None]]:  # processes send it to each other
        return type(self), (self.filename, self.errno)


@contextmanager
def naming_full_disk(target: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskFullError for ``target`` if the block fails because its disk is full: safetensors
    has its own error."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL:
            raise DiskFullError(target, number) from error
        if any(os.strerror(full) in str(error) for full in FULL):
            raise DiskFullError(target, errno.ENOSPC) from error
        raise


def size_text(number: float) -> str:
    """Bytes for people: ``1.50 GB``, ``0.21 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; if the block ends without an error, flush it to disk
    and rename it. Raises DiskFullError, which names ``path``, whatever a library raises on a full
    disk."""
    target = Path(path)
    temporary = _sibling(target)
    with naming_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # safetensors makes its files readable by their owner only
            os.chmod(temporary, mode)
            fsync(temporary)
            os.replace(temporary, target)
            fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text in UTF-8 as ``atomic_file`` does, and return the path."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    fix: str = "choose another path or pass --overwrite",
) -> Iterator[Path]:
    """As ``atomic_file``, of a directory, which replaces an old one when it is complete. Raises
    FileExistsError before any work if ``path`` is a file, or if it is not empty and ``replace`` is
    false (with ``fix``); and after it, if another process has put its directory there meanwhile. A
    folder that may be the user's is for ``folders.output_folder``."""
    # what a link leads to is replaced, not the link
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise FileExistsError(
            f"{path} is a file, expected a folder; choose another path"
        )
    if not replace and target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty; {fix}")
    temporary = _sibling(target)
    old = temporary.with_suffix(".old")
    before = _inode(target)
    conflict = f"{path} was written by another process meanwhile; choose another path"
    with naming_full_disk(target):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for inside in (*temporary.rglob("*"), temporary):
                if not inside.is_symlink():
                    fsync(inside)
            if replace and _inode(target) != before:
                raise FileExistsError(conflict)
            if replace and target.exists():
                # a directory cannot be renamed onto one that is not empty
                os.replace(target, old)
            try:
                os.replace(temporary, target)
            except OSError as error:
                if error.errno in NOT_EMPTY:
                    raise FileExistsError(conflict) from error
                if old.exists():
                    os.replace(old, target)
                raise
            fsync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if target.exists():
                # on NFS, a file that is still open keeps its folder
                shutil.rmtree(old, ignore_errors=True)


def _inode(path: Path) -> int | None:
    """What tells a directory from one that replaces it; None if there is none."""
    return path.stat().st_ino if path.exists() else None


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk. Raises OSError for what
    the file system reports only now: NFS and quotas do so when a disk is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # several network file systems refuse it for directories
            raise
    finally:
        os.close(descriptor)
