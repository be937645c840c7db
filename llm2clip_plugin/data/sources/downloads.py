"""Local copies of files at URLs, downloaded in byte ranges: a download goes on where a connection or process broke.

A copy gets its final name when it is complete, so a reader never sees part of a shard. A lock keeps the processes of a
machine from downloading a shard twice. (fsspec's file caches have no ranges that resume, no lock and no limit.)
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from llm2clip_plugin.contracts import canonical_json
from llm2clip_plugin.data.retry import RETRY, retried
from llm2clip_plugin.data.sources.urls import open_filesystem

Result = TypeVar("Result")

RANGE = 16 << 20  # bytes of a request
COPY_TIME = 0  # modification time of every copy, so that a shard's index fits the next copy too
SHARD = re.compile(r"[0-9a-f]{16}-.*\.tar")  # files that may be evicted
VERSION = {"size", "etag", "last-modified", "lastmodified", "mtime", "content-md5", "md5hash", "generation", "oid"}


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
    limit_bytes: int = 0  # least recently used shards are deleted above this size of the folder; 0: no limit

    def local_path(self, url: str) -> Path:
        """The path of a copy: a hash of the URL, and its file name reduced to letters, digits and ._-"""
        base = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:].lstrip(".")
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"

    def fetch(self, url: str) -> Path:
        """The local copy of ``url``, downloaded if there is none. Raises as ``retry.retried`` does."""
        target = self.local_path(url)
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(Path(f"{target}.lock")):
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
        for _ in range(RETRY.tries):
            try:
                return action(self.fetch(url))
            except FileNotFoundError:
                if self.local_path(url).exists():
                    raise
        return action(self.fetch(url))

    def forget(self, url: str) -> None:
        """Delete the local copy of ``url``, so that it is downloaded again when it is next used."""
        self.local_path(url).unlink(missing_ok=True)

    def read(self, url: str) -> bytes:
        """The bytes at ``url``, without a local copy: for single images. Raises as ``fetch`` does."""
        filesystem, path = open_filesystem(url)
        return retried(lambda: filesystem.cat_file(path), url)

    def _download(self, url: str, target: Path) -> None:
        filesystem, path = open_filesystem(url)
        info = retried(lambda: filesystem.info(path), url)
        version = canonical_json({key.lower(): str(value) for key, value in info.items() if key.lower() in VERSION})
        partial = target.with_name(f"{target.name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.partial")
        for old in self.folder.glob(f"{target.name}.*.partial"):
            if old != partial:
                old.unlink()  # of another version of the file
        with open(partial, "ab") as file:
            if info.get("size") is None:  # without a size there are no ranges
                file.truncate(0)
                file.write(retried(lambda: filesystem.cat_file(path), url))
            else:
                while (done := file.tell()) < info["size"]:
                    file.write(_read_range(filesystem, path, url, done, info["size"]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)

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


def _read_range(filesystem: Any, path: str, url: str, start: int, total: int) -> bytes:
    """The next range of a file of ``total`` bytes."""
    stop = min(start + RANGE, total)

    def read() -> bytes:
        data = filesystem.cat_file(path, start=start, end=stop)
        if len(data) == total and stop - start < total:
            data = data[start:stop]  # a server without ranges sends the entire file
        if len(data) != stop - start:
            raise ConnectionError(f"received {len(data)} bytes instead of {stop - start}")
        return data

    return retried(read, f"{url}, bytes {start} to {stop} of {total}")


def _locked(path: Path) -> AbstractContextManager[object]:
    from filelock import FileLock  # here, because --help of every command imports this module

    return FileLock(path)
