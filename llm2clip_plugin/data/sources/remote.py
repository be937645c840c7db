"""Shards at a URL: listed, and downloaded whole into a local folder, picking up where a connection broke.

Anything that fsspec opens works (https, s3, gs, hf ...). A download is a row of byte ranges appended to a
``.partial`` file; a range that fails is asked for again, smaller, after a pause. The file takes its final name
only when it has every byte, so a reader never sees part of a shard. A lock keeps ranks and loader workers of a
machine from fetching the same shard twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
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

from llm2clip_plugin.contracts import canonical_json, whole_file

log = logging.getLogger(__name__)

Result = TypeVar("Result")

LARGEST_RANGE = 32 << 20  # bytes asked for at once
SMALLEST_RANGE = 64 << 10  # bytes; what is still asked for when every longer answer was cut off
COPY_TIME = 0  # modification time of a copy: the same whenever a shard comes again, so that its index stays valid
SHARD = re.compile(r"[0-9a-f]{16}-.*\.tar")  # what may be thrown out of the folder
IDENTITY = {"size", "etag", "last-modified", "lastmodified", "mtime", "content-md5", "md5hash", "generation", "oid"}


def is_url(path: str) -> bool:
    """Whether ``path`` names a protocol, as in https://host/00000.tar."""
    return "://" in path


def default_download_folder() -> Path:
    """Folder for downloaded shards: LLM2CLIP_CACHE, or ``llm2clip/shards`` under XDG_CACHE_HOME or ~/.cache."""
    if "LLM2CLIP_CACHE" in os.environ:
        return Path(os.environ["LLM2CLIP_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "llm2clip" / "shards"


def expand_braces(pattern: str) -> list[str]:
    """``{00000..00012}`` and ``{a,b}`` spelled out, the leftmost braces first; other text stays as it is."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") else 0
        step = 1 if last >= first else -1
        options = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif "," in inner:
        options = inner.split(",")
    else:
        raise ValueError(f"braces in {pattern!r} hold {inner!r}; expected a span {{00000..00012}} or a list {{a,b}}")
    tails = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + tail for option, tail in itertools.product(options, tails)]


def list_urls(url: str, suffix: str) -> list[str]:
    """URLs behind ``url``: braces spelled out, then a wildcard or a folder (ending in /) listed by its filesystem.

    Raises FileNotFoundError if nothing matches; for plain HTTP servers that don't list folders, name the shards
    with braces.
    """
    found: list[str] = []
    for one in expand_braces(url):
        if "*" not in one and one.endswith(suffix):
            found.append(one)
            continue
        filesystem, path = _filesystem(one)
        pattern = path if "*" in path else path.rstrip("/") + "/**/*" + suffix
        names = sorted(str(name) for name in filesystem.glob(pattern))
        if not names:
            raise FileNotFoundError(
                f"no {suffix} files at {one}; a server that can't list a folder needs the names: "
                f"{one.rstrip('/')}/{{00000..00099}}{suffix}"
            )
        found += [filesystem.unstrip_protocol(name) for name in names]
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for ``url`` and the path on it; ValueError if its protocol or package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)  # cached by fsspec; a forked process gets a fresh one
    except (ImportError, ValueError) as error:
        raise ValueError(f"can't open {url}: {error}") from error


@dataclass(frozen=True)
class Downloads:
    """A local folder of downloaded files."""

    folder: Path
    tries: int = 8  # failures in a row, without a byte of progress, before giving up
    first_pause: float = 0.5  # seconds after a failure; doubles up to 30 s
    limit_bytes: int = 0  # the least recently used files go when the folder outgrows this; 0: keep all

    def local_path(self, url: str) -> Path:
        """Where ``url`` is kept: a hash of the URL and the last part of its name, letters, digits, ._- only."""
        base = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:].lstrip(".")
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"

    def fetch(self, url: str) -> Path:
        """The local copy of ``url``, downloaded first if it isn't there.

        Raises FileNotFoundError if the server has no such file, ConnectionError when it gives up.
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
            return self.fetch(url)  # another process has just thrown it out
        return target

    def use(self, url: str, action: Callable[[Path], Result]) -> Result:
        """``action`` on the local copy of ``url``, fetched again if another process throws it out."""
        for attempt in itertools.count():
            path = self.fetch(url)
            try:
                return action(path)
            except FileNotFoundError:
                if attempt == self.tries or path.exists():
                    raise
        raise AssertionError("count() does not end")

    def read(self, url: str) -> bytes:
        """The bytes at ``url`` without keeping a copy: for single images."""
        filesystem, path = _filesystem(url)
        return self._persist(lambda: filesystem.cat_file(path), url)

    def _download(self, url: str, target: Path) -> None:
        filesystem, path = _filesystem(url)
        info = self._persist(lambda: filesystem.info(path), url)
        total = info.get("size")
        if total is None:  # the server does not say; nothing to cut into ranges
            data = self._persist(lambda: filesystem.cat_file(path), url)
            with whole_file(target) as aside:
                aside.write_bytes(data)
            return
        identity = canonical_json({key.lower(): str(value) for key, value in info.items() if key.lower() in IDENTITY})
        partial = target.with_name(target.name + ".partial")
        note = target.with_name(target.name + ".partial.json")
        if not (note.exists() and _read_note(note) == identity):
            partial.unlink(missing_ok=True)  # begun from another version of the file
            with whole_file(note) as aside:
                aside.write_text(identity, encoding="utf-8")
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
                    data = data[done : done + want]  # a server without ranges sent the whole file
                if len(data) != want:
                    raise ConnectionError(f"{len(data)} bytes came instead of {want}")
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # each protocol has its own network errors; all mean: try again
                failures += 1
                self._pause(failures, url, error, f" at byte {done} of {total}")
                span = max(SMALLEST_RANGE, span // 4)
            else:
                file.write(data)
                failures, span = 0, min(LARGEST_RANGE, span * 2)

    def _persist(self, action: Callable[[], Any], url: str) -> Any:
        """``action()``, tried again after network errors."""
        for failures in itertools.count(1):
            try:
                return action()
            except PermissionError:
                raise
            except Exception as error:  # as in _append
                if isinstance(error, FileNotFoundError) and _said_missing(error):
                    raise FileNotFoundError(f"no file at {url}") from error
                self._pause(failures, url, error, "")

    def _pause(self, failures: int, url: str, error: Exception, where: str) -> None:
        told = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        reason = f"{url}{where}: {type(told).__name__}: {told}"
        if failures >= self.tries:
            raise ConnectionError(
                f"gave up on {reason}; {failures} tries in a row failed. What came so far is kept: "
                "the same command goes on from there"
            ) from error
        pause = min(30.0, self.first_pause * 2 ** (failures - 1))
        log.warning("%s; trying again in %.1f s (%d of %d)", reason, pause, failures, self.tries)
        time.sleep(pause)

    def _evict(self, keep: Path) -> None:
        """Remove the files used longest ago until the folder fits ``limit_bytes``; open ones stay readable."""
        if not self.limit_bytes:
            return
        with _locked(self.folder / ".evict.lock"):
            found = [(path.stat(), path) for path in self.folder.iterdir() if SHARD.fullmatch(path.name)]
            size = sum(status.st_size for status, _ in found)
            for status, path in sorted(found, key=lambda entry: entry[0].st_atime_ns):
                if size <= self.limit_bytes:
                    return
                if path != keep:
                    size -= status.st_size
                    path.unlink()


def _said_missing(error: FileNotFoundError) -> bool:
    """Whether the server said that there is no such file.

    fsspec's HTTP turns any failure of its first question into FileNotFoundError, a refused connection too; the cause
    tells. An answer of 4xx is final, but for "too slow" and "too often".
    """
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    status = vars(cause).get("status", 0)  # of aiohttp's ClientResponseError
    return 400 <= status < 500 and status not in (408, 429)


def _read_note(path: Path) -> str:
    """The identity noted beside a partial download; "" if unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError):
        return ""
    return text


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; it falls with the process, so a killed download leaves nothing locked."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
