"""Errors of disks and servers that pass: which they are, how they are retried, and how often that happened.

An error passes if the same read may succeed later: an input/output error, a stale handle of NFS, a timeout, a broken
connection, HTTP 5xx, 408, 425 and 429. A missing file, a denied access and a full disk don't pass.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit

from llm2clip_plugin.console import LINE_EVERY
from llm2clip_plugin.contracts import atomic_file, canonical_json, sha256_text
from llm2clip_plugin.hub import TIMEOUT, Retry, seconds_of_retry_after, timeout

log = logging.getLogger(__name__)

Result = TypeVar("Result")

WARN_EVERY = 30.0  # seconds between a process's warnings
PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EAGAIN", "EINTR", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "ESHUTDOWN", "EPIPE",
        "ENOLINK", "ECOMM", "EPROTO",
    )
    if hasattr(errno, name)
}  # fmt: skip
_retries = [0, 0]  # of this process: since it began, and since take_retries
_warned = [-WARN_EVERY]  # time of the last warning


def take_retries() -> int:
    """Retries of this process since the last call."""
    count, _retries[1] = _retries[1], 0
    return count


def _forget_retries() -> None:
    """In a forked process: its parent's retries are not its own."""
    _retries[:] = [0, 0]


os.register_at_fork(after_in_child=_forget_retries)


def cause_of(error: BaseException) -> BaseException:
    """The failure behind an error: fsspec's HTTP turns any, a refused connection too, into FileNotFoundError."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def http_status(error: BaseException) -> int:
    """The status that a server answered with; 0 if the error has none."""
    fields = vars(cause_of(error))  # aiohttp has status, gcsfs code
    return next((fields[name] for name in ("status", "code") if isinstance(fields.get(name), int)), 0)


def passes(error: BaseException) -> bool:
    """Whether the same read may succeed later."""
    cause, status = cause_of(error), http_status(error)
    if status:
        return status >= 500 or status in (408, 425, 429)
    if isinstance(cause, (ValueError, TypeError, AttributeError, NotImplementedError, ImportError)):
        return False  # an invalid URL or certificate, an option that a protocol doesn't have
    import ssl  # here, as below, because --help of every command imports this module

    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
        if isinstance(cause, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
            return False
        return cause.errno is None or cause.errno < 0 or cause.errno in PASSING  # below 0: of a name's look-up
    return True  # each protocol has network errors of its own


def final_error(error: Exception, url: str) -> Exception:
    """What to raise for an error at ``url`` that doesn't pass."""
    status = http_status(error)
    shown = f" (HTTP {status})" if status else ""
    if status in (401, 403, 407) or isinstance(cause_of(error), PermissionError):
        return PermissionError(f"access denied to {url}{shown}; check its permissions, token or expiry date")
    if status in (404, 410) or (not status and isinstance(cause_of(error), FileNotFoundError)):
        return FileNotFoundError(f"no file at {url}{shown}")
    if status:
        return ConnectionError(f"the server refuses {url}: {cause_of(error)}")
    return error


class Failures:
    """Consecutive failures of reading one thing."""

    def __init__(self, what: str, retry: Retry, hint: str = "rerun the same command to resume") -> None:
        """what: path or URL, for messages."""
        self.what, self.retry, self.hint = what, retry, hint
        self.reset()

    def reset(self) -> None:
        """Progress was made."""
        self.count, self._lost, self._started = 0, 0.0, time.monotonic()

    def add(self, error: Exception, where: str = "") -> None:
        """Wait before the next attempt. Raises ConnectionError after too many, ``final_error`` if it doesn't pass."""
        if not passes(error):
            raise final_error(error, self.what) from error
        self.count += 1
        self._lost += time.monotonic() - self._started
        reason = f"{self.what}{where}: {describe(error)}"
        if self.count >= self.retry.tries or self._lost > self.retry.patience:
            raise ConnectionError(f"reading failed {self.count} times in a row: {reason}; {self.hint}") from error
        pause = max(self.retry.pause(self.count), retry_after(error))
        _note(reason, pause, f"{self.count} of {self.retry.tries}")
        time.sleep(pause)
        self._started = time.monotonic()


def retried(action: Callable[[], Result], what: str, retry: Retry) -> Result:
    """``action()``, repeated after errors that pass. ``what``: the path or URL that it reads."""
    failures = Failures(what, retry)
    while True:
        try:
            return action()
        except Exception as error:  # each protocol has network errors of its own
            failures.add(error)


def _note(reason: str, pause: float, which: str) -> None:
    """Count a retry; the first one is reported, then one every WARN_EVERY seconds, with the count."""
    _retries[0] += 1
    _retries[1] += 1
    if time.monotonic() - _warned[0] < WARN_EVERY and _retries[0] > 1:
        return
    _warned[0] = time.monotonic()
    so_far = f"; {_retries[0]} retries so far in this process" if _retries[0] > 1 else ""
    log.warning("%s; retrying in %.1f s (%s)%s", reason, pause, which, so_far)


def describe(error: BaseException) -> str:
    """An error in words: its kind, its text and, of a timeout, the limit."""
    cause = cause_of(error)
    text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    limited = isinstance(cause, TimeoutError) and cause.errno is None
    return f"{text} (no answer within {timeout():g} s, {TIMEOUT})" if limited else text


def retry_after(error: BaseException) -> float:
    """Seconds that a server wants to be left alone for, by the header Retry-After of its answer; 0 without."""
    headers = vars(cause_of(error)).get("headers") or {}
    return seconds_of_retry_after(headers.get("Retry-After", ""))


def read_file(path: str | Path) -> bytes:
    """The contents of a local file. Raises OSError, ConnectionError after too many errors that pass."""
    failures = Failures(str(path), Retry())
    while True:
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            if not passes(error):
                raise
            failures.add(error)


class SteadyFile:
    """A file that is read by position, and opened again after an error that passes.

    Forked processes can share it, since no position is kept.
    """

    def __init__(self, path: str | Path, open_file: Callable[[], int] | None = None) -> None:
        """open_file: returns a descriptor, of ``path`` unless given; path is for messages."""
        self.path = str(path)
        self._open_file = open_file or (lambda: os.open(path, os.O_RDONLY))
        self._descriptor = -1
        self._attempt(lambda: None)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the descriptor; the next read opens the file again."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer at the end of the file."""
        return self._attempt(lambda: self._read(size, offset))

    def size(self) -> int:
        """Bytes of the file."""
        return self._attempt(lambda: os.fstat(self._descriptor).st_size)

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while 0 < len(data) < size:  # a signal or a network file system may cut a read short
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _attempt(self, action: Callable[[], Result]) -> Result:
        failures = Failures(self.path, Retry())
        while True:
            try:
                if self._descriptor < 0:
                    self._descriptor = self._open_file()
                return action()
            except OSError as error:
                if not passes(error):
                    raise
                self.close()  # a stale handle stays stale
                failures.add(error)


# Paths and URLs of data: braces expanded, folders at a URL listed by fsspec (https, s3, gs, hf ...).


def is_url(path: str) -> bool:
    """Whether ``path`` names a protocol, as in https://host/00000.tar."""
    return "://" in path


def has_suffix(path: str, suffix: str) -> bool:
    """Whether a path, or a URL without its query, ends with ``suffix``."""
    return path.split("?", 1)[0].endswith(suffix)


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{00000..00012}`` and ``{a,b}`` as a shell does, the first braces varying slowest."""
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
        raise ValueError(f"braces in {pattern!r} contain {inner!r}; expected a range {{00000..00012}} or list {{a,b}}")
    tails = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + tail for option, tail in itertools.product(options, tails)]


def list_urls(url: str, suffix: str) -> list[str]:
    """URLs of files: braces expanded, then a wildcard or a folder (ending in /) listed by its filesystem.

    Raises FileNotFoundError if nothing matches; plain HTTP servers don't list folders, so their files need braces.
    """
    urls: list[str] = []
    for one in expand_braces(url):
        if "*" not in one and one.endswith(suffix):
            urls.append(one)
            continue
        filesystem, path = open_filesystem(one)
        pattern = path if "*" in path else path.rstrip("/") + "/**/*" + suffix
        names = sorted(map(str, retried(partial(filesystem.glob, pattern), one, Retry())))
        if not names:
            raise FileNotFoundError(
                f"no {suffix} files at {one}; for a server that does not list folders, name the files: "
                f"{one.rstrip('/')}/{{00000..00099}}{suffix}"
            )
        urls += [filesystem.unstrip_protocol(name) for name in names]
    return urls


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for ``url`` and the path on it; ValueError if its protocol is unknown or not installed.

    Over HTTP, a server that doesn't accept a connection or sends nothing for ``timeout()`` seconds is a TimeoutError;
    other protocols have timeouts of their own.
    """
    import fsspec

    try:
        options = _http_options(url) if url.startswith(("http://", "https://")) else {}
        return fsspec.core.url_to_fs(url, **options)  # cached by fsspec; a forked process gets a fresh one
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


def _http_options(url: str) -> dict[str, Any]:
    """Timeouts, unless fsspec's own configuration sets some; aiohttp's is 300 s for a request of any size."""
    from aiohttp import ClientTimeout
    from fsspec.config import conf

    limits = ClientTimeout(total=None, sock_connect=timeout(), sock_read=timeout())
    configured = conf.get(url.partition(":")[0], {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": limits, **configured}}


# What is derived from data once and read at every later start: indexes, digests, results of checks.

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


# Local copies of files at URLs, downloaded in byte ranges that resume where a connection broke.

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


# Where a path is: on a local disk, on a file system over a network, or at a URL.

MOUNTS = "/proc/self/mounts"
NETWORK = (  # types of file systems over a network, as /proc/mounts writes them; fuse.* in addition
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "glusterfs", "orangefs", "pvfs2",
    "panfs", "wekafs", "virtiofs", "fuse", "davfs", "ocfs2", "gfs2", "quobyte", "pfs",
)  # fmt: skip
LOCAL_FUSE = ("fuseblk", "fuse.mergerfs", "fuse.fuse-overlayfs", "fuse.ntfs-3g")


def file_system(path: str, mounts: str = MOUNTS) -> str:
    """Type of the file system that holds ``path``, as in /proc/mounts; "url" for a URL, "" if unknown."""
    if is_url(path):
        return "url"
    real = os.path.realpath(path)
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return ""
    best, kind = "", ""
    for _, point, name, *_ in lines:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the last of several mounts at one place is on top
            best, kind = point, name
    return kind


def is_network(path: str, mounts: str = MOUNTS) -> bool:
    """Whether ``path`` is a URL, or on a file system over a network."""
    kind = file_system(path, mounts)
    return kind == "url" or kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
