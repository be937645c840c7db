"""Transient errors of disks and servers: which they are, how reads are retried, and how often that happened.

An error is transient if the same read may succeed later: an input/output error, a stale handle of NFS, a timeout, a
broken connection, HTTP 5xx, 408, 425 and 429. A missing file, a denied access and a full disk are not.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from llm2clip_plugin.contracts import atomic_file, canonical_json
from llm2clip_plugin.hub import TIMEOUT, Retry, seconds_of_retry_after, timeout

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY = Retry()
WARN_EVERY = 30.0  # seconds between a process's warnings
NAMES = (
    "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EAGAIN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTDOWN",
    "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "ENOLINK", "ECOMM", "EPROTO",
)  # fmt: skip
TRANSIENT = {getattr(errno, name) for name in NAMES if hasattr(errno, name)}
_retries = [0]  # of this process since take_retries
_warned = [-WARN_EVERY]  # time of the last warning


class ReadFailedError(ConnectionError):
    """A read that failed too often."""


def take_retries() -> int:
    """Retries of this process since the last call."""
    count, _retries[0] = _retries[0], 0
    return count


os.register_at_fork(after_in_child=take_retries)  # the parent's are not the child's


def retried(action: Callable[[], Result], what: str) -> Result:
    """``action()``, repeated with growing pauses after transient errors. ``what``: the path or URL that it reads.

    Raises ReadFailedError after too many failures, and for what is permanent FileNotFoundError, PermissionError, or
    the error itself.
    """
    failures, lost = 0, 0.0
    while True:
        started = time.monotonic()
        try:
            return action()
        except Exception as error:  # each protocol has network errors of its own
            if not is_transient(error):
                if (final := _final_error(error, what)) is error:
                    raise
                raise final from error
            failures += 1
            lost += time.monotonic() - started
            reason = f"{what}: {_describe(error)}"
            if failures >= RETRY.tries or lost > RETRY.patience:
                raise ReadFailedError(
                    f"reading failed {failures} times in a row: {reason}; rerun the same command to resume"
                ) from error
            pause = max(RETRY.pause(failures), _retry_after(error))
            _retries[0] += 1
            if time.monotonic() - _warned[0] >= WARN_EVERY:
                _warned[0] = time.monotonic()
                log.warning("%s; retrying in %.1f s (%d of %d)", reason, pause, failures, RETRY.tries)
            time.sleep(pause)


def is_transient(error: BaseException) -> bool:
    """Whether the same read may succeed later."""
    cause, status = _cause_of(error), _http_status(error)
    if status:
        return status >= 500 or status in (408, 425, 429)
    if isinstance(cause, (ValueError, TypeError, AttributeError, NotImplementedError, ImportError, ReadFailedError)):
        return False  # an invalid URL or certificate, an option that a protocol doesn't have
    import ssl  # here, as below, because --help of every command imports this module

    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
        if isinstance(cause, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
            return False
        return cause.errno is None or cause.errno < 0 or cause.errno in TRANSIENT  # below 0: of a name's look-up
    return True


def _cause_of(error: BaseException) -> BaseException:
    """The failure behind an error: fsspec's HTTP turns any, a refused connection too, into FileNotFoundError."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def _http_status(error: BaseException) -> int:
    """The status that a server answered with; 0 if the error has none."""
    fields = vars(_cause_of(error))  # aiohttp has status, gcsfs code
    return next((fields[name] for name in ("status", "code") if isinstance(fields.get(name), int)), 0)


def _final_error(error: Exception, what: str) -> Exception:
    """What to raise for an error that is not transient."""
    status, cause = _http_status(error), _cause_of(error)
    shown = f" (HTTP {status})" if status else ""
    if status in (401, 403, 407) or isinstance(cause, PermissionError):
        return PermissionError(f"access denied to {what}{shown}; check its permissions, token or expiry date")
    if status in (404, 410) or (not status and isinstance(cause, FileNotFoundError)):
        return FileNotFoundError(f"no file at {what}{shown}")
    return ConnectionError(f"the server refuses {what}: {cause}") if status else error


def _describe(error: BaseException) -> str:
    cause = _cause_of(error)
    text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    limited = isinstance(cause, TimeoutError) and cause.errno is None
    return f"{text} (no answer within {timeout():g} s, {TIMEOUT})" if limited else text


def _retry_after(error: BaseException) -> float:
    """Seconds by the header Retry-After of a server's answer; 0 without."""
    headers = vars(_cause_of(error)).get("headers") or {}
    return seconds_of_retry_after(headers.get("Retry-After", ""))


def read_file(path: str | Path) -> bytes:
    """The contents of a local file. Raises as ``retried`` does."""
    return retried(lambda: Path(path).read_bytes(), str(path))


class RetryingFile:
    """A file that is read by position, and opened again after a transient error.

    Forked processes can share it, since no position is kept.
    """

    def __init__(self, path: str | Path, open_file: Callable[[], int] | None = None) -> None:
        """open_file: returns a descriptor, of ``path`` unless given; path is for messages."""
        self.path = str(path)
        self._open_file = open_file or (lambda: os.open(path, os.O_RDONLY))
        self._descriptor = -1
        self.size()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the descriptor; the next read opens the file again."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer at the end of the file."""
        return self._retried(lambda descriptor: _pread(descriptor, size, offset))

    def size(self) -> int:
        """Bytes of the file."""
        return self._retried(lambda descriptor: os.fstat(descriptor).st_size)

    def _retried(self, action: Callable[[int], Result]) -> Result:
        def attempt() -> Result:
            try:
                if self._descriptor < 0:
                    self._descriptor = self._open_file()
                return action(self._descriptor)
            except OSError:
                self.close()  # a stale handle stays stale
                raise

        return retried(attempt, self.path)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # a signal or a network file system may cut a read short
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


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
        names = sorted(retried(lambda: filesystem.glob(pattern), one))  # noqa: B023
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

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):  # aiohttp's own timeout is 300 s for a request of any size
        from aiohttp import ClientTimeout
        from fsspec.config import conf

        limits = ClientTimeout(total=None, sock_connect=timeout(), sock_read=timeout())
        configured = conf.get(url.partition(":")[0], {}).get("client_kwargs", {})
        options = {"client_kwargs": {"timeout": limits, **configured}}
    try:
        return fsspec.core.url_to_fs(url, **options)  # cached by fsspec; a forked process gets a fresh one
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


# What is derived from data once and read at every later start: indexes, and digests of captions.

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


# Local copies of files at URLs, downloaded in byte ranges: a download goes on where a connection or process broke.

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


# Whether data is read over a network, and how many of its shards are then shuffled together.

MOUNTS = "/proc/self/mounts"
NETWORK = (  # types of file systems over a network, as /proc/mounts writes them; fuse.* in addition
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "glusterfs", "orangefs", "pvfs2",
    "panfs", "wekafs", "virtiofs", "fuse", "davfs", "ocfs2", "gfs2", "quobyte", "pfs",
)  # fmt: skip
LOCAL_FUSE = ("fuse.mergerfs", "fuse.fuse-overlayfs", "fuse.ntfs-3g")
NETWORK_WINDOW = 16  # shards; of 10,000 samples each: 160,000, dozens of global batches


def shuffle_window(configured: int, paths: Sequence[str], mounts: str = MOUNTS) -> int:
    """Shards that are shuffled together, 0 for whole sources: as configured, or, for -1, by where the data is."""
    if configured >= 0:
        return configured
    return NETWORK_WINDOW if any(is_network(path, mounts) for path in paths) else 0


def is_network(path: str, mounts: str = MOUNTS) -> bool:
    """Whether ``path`` is a URL, or on a file system over a network."""
    if is_url(path):
        return True
    real, best, kind = os.path.realpath(path), "", ""
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return False
    for _, point, name, *_ in lines:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the last of several mounts at one place is on top
            best, kind = point, name
    return kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
