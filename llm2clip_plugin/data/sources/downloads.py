"""Local copies of files at URLs, downloaded in byte ranges that resume where a connection broke.

Ranges are appended to a ``.partial`` file; a range that fails is requested again, smaller, after a pause. The file gets
its final name when it is complete, so a reader never sees part of a shard. A lock keeps the ranks and loader workers of
a machine from downloading a shard twice.
"""

import fcntl
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from llm2clip_plugin.contracts import atomic_file, canonical_json
from llm2clip_plugin.data.sources.urls import open_filesystem

log = logging.getLogger(__name__)

Result = TypeVar("Result")

LARGEST_RANGE = 32 << 20  # bytes of a request
SMALLEST_RANGE = 64 << 10  # bytes of a request after larger ones have failed
COPY_TIME = 0  # modification time of every copy, so that a shard's index fits the next copy too
SHARD = re.compile(r"[0-9a-f]{16}-.*\.tar")  # files that may be evicted
VERSION = {
    "size",
    "etag",
    "last-modified",
    "lastmodified",
    "mtime",
    "content-md5",
    "md5hash",
    "generation",
    "oid",
}


def default_download_folder() -> Path:
    """LLM2CLIP_CACHE, or ``llm2clip/shards`` under XDG_CACHE_HOME or ~/.cache."""
    if "LLM2CLIP_CACHE" in os.environ:
        return Path(os.environ["LLM2CLIP_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "llm2clip" / "shards"


@dataclass(frozen=True)
class Downloads:
    """A local folder of downloaded files."""

    folder: Path
    tries: int = 8  # consecutive failures before giving up
    first_pause: float = 0.5  # seconds after a failure; doubles up to 30 s
    limit_bytes: int = 0  # least recently used shards are deleted above this size of the folder; 0: no limit

    def local_path(self, url: str) -> Path:
        """The path of a copy: a hash of the URL, and its file name reduced to letters, digits and ._-"""
        base = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:].lstrip(".")
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"

    def fetch(self, url: str) -> Path:
        """The local copy of ``url``, downloaded if there is none.

        Raises FileNotFoundError if the server has no such file, ConnectionError after too many failures.
        """
        target = self.local_path(url)
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_name(target.name + ".lock")):
                if not target.exists():  # another process may have been faster
                    self._download(url, target)
            self._evict(keep=target)
        try:
            os.utime(target, ns=(time.time_ns(), COPY_TIME))  # mark as used
        except FileNotFoundError:
            return self.fetch(url)  # another process has just evicted it
        return target

    def use(self, url: str, action: Callable[[Path], Result]) -> Result:
        """``action`` on the local copy of ``url``, downloaded again if another process evicts it."""
        for attempt in itertools.count():
            path = self.fetch(url)
            try:
                return action(path)
            except FileNotFoundError:
                if attempt == self.tries or path.exists():
                    raise
        raise AssertionError("count() does not end")

    def read(self, url: str) -> bytes:
        """The bytes at ``url``, without a local copy: for single images."""
        filesystem, path = open_filesystem(url)
        return self._persist(lambda: filesystem.cat_file(path), url)

    def _download(self, url: str, target: Path) -> None:
        filesystem, path = open_filesystem(url)
        info = self._persist(lambda: filesystem.info(path), url)
        total = info.get("size")
        if total is None:  # without a size there are no ranges
            data = self._persist(lambda: filesystem.cat_file(path), url)
            with atomic_file(target) as temporary:
                temporary.write_bytes(data)
            return
        version = canonical_json({key.lower(): str(value) for key, value in info.items() if key.lower() in VERSION})
        partial = target.with_name(target.name + ".partial")
        note = target.with_name(target.name + ".partial.json")
        if _read_note(note) != version:
            partial.unlink(missing_ok=True)  # it holds bytes of another version of the file
            with atomic_file(note) as temporary:
                temporary.write_text(version, encoding="utf-8")
        with open(partial, "ab") as file:
            self._append(filesystem, path, url, file, total)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        note.unlink()

    def _append(self, filesystem: Any, path: str, url: str, file: Any, total: int) -> None:
        """Append ranges to ``file`` until it has ``total`` bytes."""
        span, failures = LARGEST_RANGE, 0
        file.truncate(min(file.seek(0, os.SEEK_END), total))
        while (done := file.seek(0, os.SEEK_END)) < total:
            want = min(span, total - done)
            try:
                data = filesystem.cat_file(path, start=done, end=done + want)
                if len(data) == total and want < total:
                    data = data[done : done + want]  # a server without ranges sends the entire file
                if len(data) != want:
                    raise ConnectionError(f"received {len(data)} bytes instead of {want}")
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # each protocol has its own network errors; all are worth a retry
                failures += 1
                self._pause(failures, url, error, f" at byte {done} of {total}")
                span = max(SMALLEST_RANGE, span // 4)
            else:
                file.write(data)
                failures, span = 0, min(LARGEST_RANGE, span * 2)

    def _persist(self, action: Callable[[], Any], url: str) -> Any:
        """``action()``, retried after network errors."""
        for failures in itertools.count(1):
            try:
                return action()
            except PermissionError:
                raise
            except Exception as error:  # as in _append
                if isinstance(error, FileNotFoundError) and _is_missing(error):
                    raise FileNotFoundError(f"no file at {url}") from error
                self._pause(failures, url, error, "")

    def _pause(self, failures: int, url: str, error: Exception, where: str) -> None:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        reason = f"{url}{where}: {type(cause).__name__}: {cause}"
        if failures >= self.tries:
            raise ConnectionError(
                f"download failed {failures} times in a row: {reason}; rerun the same command to resume"
            ) from error
        pause = min(30.0, self.first_pause * 2 ** (failures - 1))
        log.warning("%s; retrying in %.1f s (%d of %d)", reason, pause, failures, self.tries)
        time.sleep(pause)

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used shards until the folder fits ``limit_bytes``; open files stay readable."""
        if not self.limit_bytes:
            return
        with _locked(self.folder / ".evict.lock"):
            shards = [(path.stat(), path) for path in self.folder.iterdir() if SHARD.fullmatch(path.name)]
            size = sum(status.st_size for status, _ in shards)
            for status, path in sorted(shards, key=lambda entry: entry[0].st_atime_ns):
                if size <= self.limit_bytes:
                    return
                if path != keep:
                    size -= status.st_size
                    path.unlink()


def _is_missing(error: FileNotFoundError) -> bool:
    """Whether the server has no such file.

    fsspec's HTTP turns any failure of its first request into FileNotFoundError, a refused connection too, so the cause
    decides: a status of 4xx is final, except 408 (timeout) and 429 (too many requests).
    """
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    status = vars(cause).get("status", 0)  # of aiohttp's ClientResponseError
    return 400 <= status < 500 and status not in (408, 429)


def _read_note(path: Path) -> str:
    """The version of the file that a partial download is of; "" if unknown."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when a process is killed."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
