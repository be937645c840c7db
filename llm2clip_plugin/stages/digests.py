"""Digests of files and folders, by which ``llm2clip run`` sees what has changed since a stage read
it.

A file is hashed once, and again only if its size or one of its times is another one: what a file
holds cannot change without its change time (ctime). A time within SETTLED seconds of the hashing
proves nothing, since clocks of file systems are coarse.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.data.remote import is_url
from llm2clip_plugin.data.samples import cores, map_in_order
from llm2clip_plugin.hashes import canonical_json, sha256_file, sha256_text
from llm2clip_plugin.progress import track

SETTLED = 2.0  # seconds
THREADS = 8  # that hash, at most; hashing needs no GIL
NAMED = (
    # files of an artifact whose digests are recorded one by one, so that a message can name the one
    # that changed
    1000
)
ABSENT = "absent"  # digest of a file that is not there


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Files that stages read or make."""

    name: str  # as messages call it
    # name for messages -> path, URL, or NAME@COMMIT of the Hub; as of now
    files: Callable[[], Mapping[str, str]]


def folder_files(
    folder: Path, root: Path, patterns: tuple[str, ...] = ("**/*",)
) -> dict[str, str]:
    """The files of a folder, or a single one, named relative to ``root``; none that are hidden or
    in hidden folders."""
    if folder.is_file():
        return {os.path.relpath(folder, root): str(folder)}
    files: dict[str, str] = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in inside):
            files[os.path.relpath(path, root)] = str(path)
    return files


class Digests:
    """SHA-256 of files, kept in a file of the run's folder with the stamps of the files."""

    FILE = "digests.json"

    def __init__(self, out: Path) -> None:
        self._out = out.absolute()
        self._known: dict[str, list[Any]] = {}  # path -> [size, mtime, ctime, SHA-256]
        self._changed = False
        with suppress(OSError, ValueError):  # without it, files are hashed again
            self._known = dict(
                json.loads((out / self.FILE).read_text(encoding="utf-8"))
            )

    def of(self, artifact: Artifact) -> dict[str, Any]:
        """``{"sha256": over all files, "files": {name: digest}}``; "files" is None for more than
        NAMED."""
        files = dict(artifact.files())
        unknown = [path for path in files.values() if self._recall(path) is None]
        with ThreadPoolExecutor(min(THREADS, cores())) as threads:
            hashed = map_in_order(threads, _hash, unknown, ahead=2 * THREADS)
            label = f"digests of {artifact.name}"
            results = track(hashed, total=len(unknown), label=label, unit="files")
            fresh = dict(zip(unknown, results, strict=True))
        for path, (stamp, digest) in fresh.items():
            if stamp:
                self._known[self._place(path)] = [*stamp, digest]
                self._changed = True
        table: dict[str, str | None] = {}
        for name, path in files.items():
            table[name] = fresh[path][1] if path in fresh else self._recall(path)
        names = None
        if len(table) <= NAMED:
            names = {name: str(digest)[:16] for name, digest in table.items()}
        return {"sha256": sha256_text(canonical_json(table)), "files": names}

    def save(self) -> None:
        """Write what was hashed for the next start."""
        if self._changed:
            write_text(self._out / self.FILE, json.dumps(self._known) + "\n")
            self._changed = False

    def _recall(self, path: str) -> str | None:
        entry = self._known.get(self._place(path))
        return entry[3] if entry and entry[:3] == _stamp(path) else None

    def _place(self, path: str) -> str:
        """A path in the run's folder is relative to it, so that the folder can be moved."""
        absolute = Path(path).absolute()
        inside = absolute.is_relative_to(self._out)
        return f"./{absolute.relative_to(self._out)}" if inside else str(absolute)


def _stamp(path: str) -> list[int]:
    with suppress(OSError):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return []


def _hash(path: str) -> tuple[list[int], str]:
    """The stamp, [] if it proves nothing later on, and the digest."""
    if is_url(path):
        return [], path
    before = _stamp(path)
    now = time.time_ns()
    try:
        digest = sha256_file(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return [], ABSENT
    settled = before == _stamp(path) and max(before[1:]) < now - SETTLED * 1e9
    return before if settled else [], digest
