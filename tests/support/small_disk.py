"""A small file system of a test's own, which can be filled."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILLER = "filler"


def mount(folder: Path, size: str) -> None:
    """Mount a file system of this size; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"only root can mount a small disk: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """The folder, while a file system of this size is mounted there."""
    mount(folder, size)
    try:
        yield folder
    finally:
        unmount(folder)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Fill the disk with a file, but for ``leave`` bytes; returns the file."""
    with open(folder / FILLER, "wb", buffering=0) as file:
        if leave:
            file.write(bytes(max(shutil.disk_usage(folder).free - leave, 0)))
            return folder / FILLER
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return folder / FILLER
