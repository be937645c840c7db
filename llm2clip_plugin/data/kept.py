"""What is derived from data once and read at every later start: indexes, digests, results of checks.

It lies in ``.llm2clip`` next to the data or, where that folder is read-only, in a folder of the user's. Losing it costs
time, never correctness: everything there has a checksum and the size and time of what it was derived from.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.progress import LINE_EVERY

log = logging.getLogger(__name__)

FOLDER = ".llm2clip"
CAN_NOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
LEDGER = {"kind": "llm2clip-ledger", "format_version": 1}
_held: set[int] = set()  # descriptors of the locks that this process holds


@dataclass(frozen=True)
class KeptFolder:
    """Where files derived from the data of one folder are kept."""

    main: Path
    spare: Path  # used if ``main`` can't be written

    @classmethod
    def of(cls, place: str | Path, spare_folder: Path) -> KeptFolder:
        """For data in the local folder ``place``."""
        digest = hashlib.sha256(os.path.abspath(place).encode()).hexdigest()[:16]
        return cls(Path(place) / FOLDER, spare_folder / f"kept-{digest}")

    @classmethod
    def of_url(cls, place: str, spare_folder: Path) -> KeptFolder:
        """For data below the URL ``place``."""
        folder = spare_folder / f"kept-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
        return cls(folder, folder)

    def paths(self, name: str) -> tuple[Path, ...]:
        """The places of a file, to be read in this order."""
        return tuple(dict.fromkeys((self.main / name, self.spare / name)))

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Call ``write`` with a temporary path and rename it to ``name``; returns where. Raises OSError."""
        for path in self.paths(name):
            try:
                with atomic_file(path) as temporary:
                    write(temporary)
            except OSError as error:
                if error.errno not in CAN_NOT_WRITE or path == self.paths(name)[-1]:
                    raise
            else:
                return path
        raise AssertionError("there is at least one place")

    @contextmanager
    def lock(self, doing: str) -> Iterator[None]:
        """Hold the folder's lock, so that one process does ``doing`` and the others find it done.

        A waiting process prints a line every ten seconds (one of a launcher's ranks on a machine). The system releases
        the lock of a killed process. Without a place or a file system for locks, nobody waits.
        """
        file = self._locked_file(doing)
        if file is None:
            yield
            return
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())
            fcntl.flock(file, fcntl.LOCK_UN)
            file.close()

    def _locked_file(self, doing: str) -> IO[str] | None:
        for path in self.paths("lock"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "a+", encoding="utf-8")
            except OSError:
                continue
            if _wait(file, doing):
                return file
            file.close()
        return None


def _wait(file: IO[str], doing: str) -> bool:
    """Wait for the lock; False if the file system has none."""
    show, started = os.environ.get("LOCAL_RANK", "0") == "0", time.monotonic()
    lines = 0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - started
            if show and waited >= (lines + 1) * LINE_EVERY:
                lines += 1
                file.seek(0)
                print(f"waited {waited:.0f} s for {file.read(200).strip() or 'another process'}", file=sys.stderr)
            time.sleep(min(1.0, 0.02 + waited / 10))  # few requests to a network disk
        except OSError:
            return False
        else:
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} to {doing}")
                file.flush()
            except OSError:
                pass  # a full disk
            return True


def _forget_locks() -> None:
    """In a forked process: its copies of the descriptors would hold the locks of a killed parent."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


@dataclass(frozen=True)
class Ledger:
    """A file of JSON values by name, with a checksum."""

    folder: KeptFolder
    name: str

    def read(self) -> dict[str, Any]:
        """All entries of both places, the newer file's first; a damaged file has none and is logged as a warning."""
        parts: list[tuple[float, dict[str, Any]]] = []
        for path in self.folder.paths(self.name):
            try:
                text, time = path.read_text(encoding="utf-8"), path.stat().st_mtime
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                log.warning("cannot read %s (%s); checking its contents again", path, error)
                continue
            head, _, body = text.partition("\n")
            if head == canonical_json({**LEDGER, "sha256": sha256_text(body)}):
                parts.append((time, json.loads(body)))
            else:
                log.warning("%s is damaged; its contents are checked again", path)
        entries: dict[str, Any] = {}
        for _, part in sorted(parts, key=lambda part: part[0]):
            entries |= part
        return entries

    def add(self, entries: dict[str, Any]) -> None:
        """Add or replace entries, keeping those that other processes have added. The caller holds the folder's lock.

        If nothing can be written, the next start checks again.
        """
        if not entries:
            return
        body = canonical_json({**self.read(), **entries})
        text = canonical_json({**LEDGER, "sha256": sha256_text(body)}) + "\n" + body
        try:
            self.folder.write(self.name, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            log.warning("cannot record what was checked (%s); the next start checks it again", error)
