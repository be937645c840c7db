"""Local copies of files at URLs, downloaded in byte ranges that resume where a connection broke.

Ranges are appended to a ``.partial`` file; a range that fails is requested again, smaller, after a pause (data.retry
has the rules). The file gets its final name when it is complete, so a reader never sees part of a shard. A lock keeps
the ranks and loader workers of a machine from downloading a shard twice.
"""

import fcntl
import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from llm2clip_plugin.contracts import atomic_file, canonical_json
from llm2clip_plugin.data.retry import Failures, Retry, retried
from llm2clip_plugin.data.sources.urls import has_suffix, open_filesystem

Result = TypeVar("Result")

LARGEST_RANGE = 32 << 20  # bytes of a request
SMALLEST_RANGE = 64 << 10  # bytes of a request after larger ones have failed
COPY_TIME = 0  # modification time of every copy, so that a shard's index fits the next copy too
SHARD = re.compile(r"[0-9a-f]{16}-.*\.tar")  # files that may be evicted
PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype html|html)\b", re.IGNORECASE | re.DOTALL)
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
    retry: Retry = field(default_factory=Retry)
    limit_bytes: int = 0  # least recently used shards are deleted above this size of the folder; 0: no limit

    def local_path(self, url: str) -> Path:
        """The path of a copy: a hash of the URL, and its file name reduced to letters, digits and ._-"""
        base = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:].lstrip(".")
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"

    def fetch(self, url: str) -> Path:
        """The local copy of ``url``, downloaded if there is none.

        Raises FileNotFoundError if the server has no such file, PermissionError if it denies access, ConnectionError
        after too many failures.
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
                if attempt == self.retry.tries or path.exists():
                    raise
        raise AssertionError("count() does not end")

    def forget(self, url: str) -> None:
        """Delete the local copy of ``url``, so that it is downloaded again when it is next used."""
        target = self.local_path(url)
        for path in (target, target.with_name(target.name + ".partial")):
            path.unlink(missing_ok=True)

    def read(self, url: str) -> bytes:
        """The bytes at ``url``, without a local copy: for single images. Raises as ``fetch`` does."""
        filesystem, path = open_filesystem(url)
        return retried(lambda: filesystem.cat_file(path), url, self.retry)

    def _download(self, url: str, target: Path) -> None:
        filesystem, path = open_filesystem(url)
        info = retried(lambda: filesystem.info(path), url, self.retry)
        total = info.get("size")
        if total is None:  # without a size there are no ranges
            data = retried(lambda: _not_a_page(filesystem.cat_file(path), url), url, self.retry)
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
        span, failures = LARGEST_RANGE, Failures(url, self.retry)
        file.truncate(min(file.seek(0, os.SEEK_END), total))
        while (done := file.seek(0, os.SEEK_END)) < total:
            want = min(span, total - done)
            try:
                data = filesystem.cat_file(path, start=done, end=done + want)
                if len(data) == total and want < total:
                    data = data[done : done + want]  # a server without ranges sends the entire file
                if done == 0:
                    _not_a_page(data, url)
                if len(data) != want:
                    raise ConnectionError(f"received {len(data)} bytes instead of {want}")
            except Exception as error:
                failures.add(error, f" at byte {done} of {total}")
                span = max(SMALLEST_RANGE, span // 4)
            else:
                file.write(data)
                failures.reset()
                span = min(LARGEST_RANGE, span * 2)

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


def _not_a_page(data: bytes, url: str) -> bytes:
    """The data; ConnectionError for a web page in its place, which overloaded servers and logins send with HTTP 200."""
    if PAGE.match(data) and not has_suffix(url, ".html"):
        raise ConnectionError("the server sent a web page (HTML) instead of the file")
    return data


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
