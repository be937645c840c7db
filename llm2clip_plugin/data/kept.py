"""What is derived from data once and read at every later start: indexes, and digests of captions.

It lies in ``.llm2clip`` next to the data or, where that folder is read-only, in a folder of the user's. Losing it costs
time, never correctness: it is compared with the size and time of the files that it was derived from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import atomic_file, canonical_json
from llm2clip_plugin.data.sources.urls import is_url

log = logging.getLogger(__name__)

FOLDER = ".llm2clip"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class SideFolder:
    """Where files derived from the data of one folder or URL are."""

    main: Path
    spare: Path  # used if ``main`` can't be written

    @classmethod
    def of(cls, place: str, spare_folder: Path) -> SideFolder:
        """For data in the local folder, or below the URL, ``place``."""
        name = place if is_url(place) else os.path.abspath(place)
        spare = spare_folder / f"kept-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return cls(spare if is_url(place) else Path(place) / FOLDER, spare)

    def paths(self, name: str) -> tuple[Path, Path]:
        """Where a file may be."""
        return self.main / name, self.spare / name

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Call ``write`` with a temporary path and rename it to ``name``; returns where. Raises OSError."""
        main, spare = self.paths(name)
        try:
            with atomic_file(main) as temporary:
                write(temporary)
            return main
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
        with atomic_file(spare) as temporary:
            write(temporary)
        return spare

    @contextmanager
    def lock(self, doing: str) -> Iterator[None]:
        """Hold the folder's lock, so that one process does ``doing`` and the others find it done.

        Without a folder that can be written, or a file system with locks, nobody waits.
        """
        from filelock import FileLock, Timeout

        for path in self.paths("lock"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path)
                lock.acquire(timeout=0)
            except Timeout:
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"waiting for another process to {doing} ({path})", file=sys.stderr)
                lock.acquire(poll_interval=0.2)
            except (OSError, NotImplementedError):
                continue
            try:
                yield
            finally:
                lock.release()
            return
        yield

    def read_json(self, name: str) -> dict[str, Any]:
        """The entries of a JSON file in both places, the newer file's first; {} for a damaged one."""
        parts: list[tuple[float, dict[str, Any]]] = []
        for path in self.paths(name):
            try:
                entries = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(entries, dict):
                    raise ValueError(f"contains a {type(entries).__name__}")
                parts.append((path.stat().st_mtime, entries))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                log.warning("cannot read %s (%s); its contents are computed again", path, error)
        return {name: value for _, part in sorted(parts, key=lambda part: part[0]) for name, value in part.items()}

    def add_json(self, name: str, entries: dict[str, Any]) -> None:
        """Add or replace entries of a JSON file. The caller holds the lock."""
        text = canonical_json({**self.read_json(name), **entries})
        try:
            self.write(name, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            log.warning("cannot write %s (%s); the next start computes it again", self.main / name, error)
