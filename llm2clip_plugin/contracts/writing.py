"""Files and folders that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2clip_plugin.contracts.full_disk import naming_full_disk


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; if the block ends without an error, flush it to disk and rename it.

    Raises DiskFullError, which names ``path``, whatever a library raises on a full disk.
    """
    target = Path(path)
    temporary = _sibling(target)
    with naming_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            os.chmod(temporary, mode)  # safetensors makes its files readable by their owner only
            fsync(temporary)
            os.replace(temporary, target)
            fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory; if the block ends without an error, flush its files to disk and rename it.

    Raises FileExistsError before any work if ``path`` is not empty and ``replace`` is false; DiskFullError as
    ``atomic_file``.
    """
    target = Path(path)
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another path or pass --overwrite")
    temporary = _sibling(target)
    old = temporary.with_suffix(".old")
    with naming_full_disk(target):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for inside in (*temporary.rglob("*"), temporary):
                if not inside.is_symlink():
                    fsync(inside)
            if target.exists():
                os.replace(target, old)  # a directory cannot be renamed onto one that is not empty
            try:
                os.replace(temporary, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
            fsync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)  # on NFS, a file that is still open keeps its folder


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk.

    Raises OSError for what the file system reports only now: NFS and quotas do so when a disk is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # several network file systems refuse it for directories
            raise
    finally:
        os.close(descriptor)
