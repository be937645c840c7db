"""Files at URLs (by fsspec) and on disks that fail for a while: listed, copied, read, retried.
Where derived files are.

An error is transient if the same read may succeed later: an input/output error, a stale handle of
NFS, a timeout, a broken connection, HTTP 5xx, 408, 425 and 429. A missing file, a denied access and
a full disk are not.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from llm2clip_plugin.atomic import atomic_file, fsync
from llm2clip_plugin.hashes import canonical_json
from llm2clip_plugin.hub import TIMEOUT, Retry, seconds_of_retry_after, timeout
from llm2clip_plugin.outside import without_queries

log = logging.getLogger(__name__)

Result = TypeVar("Result")

Stamp = tuple[int, int]  # size in bytes and modification time in ns of a file

RETRY = Retry()
FOLDER = ".llm2clip"
# of the file system of a folder
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
WARN_EVERY = 30.0  # seconds between a process's warnings
RANGE = 16 << 20  # bytes of a request
# modification time of every copy, so that a shard's index fits the next copy too
COPY_TIME = 0
SHARD = re.compile(r"[0-9a-f]{16}-.*\.tar")  # files that may be evicted
ERRORS = (
    "EIO ESTALE ETIMEDOUT EREMOTEIO EAGAIN ECONNRESET ECONNABORTED ECONNREFUSED EHOSTDOWN "
    "EHOSTUNREACH ENETDOWN ENETRESET ENETUNREACH ENOTCONN EPIPE ENOLINK ECOMM EPROTO"
)
TRANSIENT = {getattr(errno, name) for name in ERRORS.split() if hasattr(errno, name)}
NETWORK = (  # types of file systems over a network; fuse.* in addition
    "nfs nfs4 lustre gpfs beegfs ceph cifs smb3 9p afs glusterfs orangefs pvfs2 panfs wekafs "
    "virtiofs fuse davfs ocfs2 gfs2 quobyte pfs"
).split()
LOCAL_FUSE = ("fuse.mergerfs", "fuse.fuse-overlayfs", "fuse.ntfs-3g")
NETWORK_WINDOW = 16  # shards at least
# global batches at least: half a minute on 64 H100, in which the next window is downloaded
NETWORK_BATCHES = 128
_retries = [0]  # of this process since take_retries
_warned = [-WARN_EVERY]  # time of the last warning


def is_url(path: str) -> bool:
    """Whether ``path`` names a protocol, as in https://host/00000.tar."""
    return "://" in path


def public_name(path: str) -> str:
    """The last part of a path or URL: of a URL without its query, which may hold a key."""
    if is_url(path):
        path = path.split("?", 1)[0]
    return path.rstrip("/").rpartition("/")[2]


def has_suffix(path: str, suffix: str) -> bool:
    """Whether a path, or a URL without its query, ends with ``suffix``."""
    return path.split("?", 1)[0].endswith(suffix)


def shuffle_window(
    configured: int, paths: Sequence[str], batch_shards: float = 0.0
) -> int:
    """Shards that are shuffled together, 0 for whole sources: as configured, or, for -1, by where
    the data is.

    A sample read at random opens its shard. Local disks sustain that; servers of network file
    systems and URLs rarely do, so there windows of shards stay open. ``batch_shards``: shards with
    as many samples as a global batch.
    """
    if configured >= 0:
        return configured
    if not any(map(is_network, paths)):
        return 0
    return max(NETWORK_WINDOW, math.ceil(NETWORK_BATCHES * batch_shards))


def is_network(path: str) -> bool:
    """Whether ``path`` is a URL, or on a file system over a network."""
    if is_url(path):
        return True
    import psutil  # comes with accelerate

    mounts = psutil.disk_partitions(all=True)
    kinds = {mount.mountpoint: mount.fstype for mount in mounts}
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if str(folder) in kinds:
            kind = kinds[str(folder)]
            is_remote_fuse = kind.startswith("fuse.") and kind not in LOCAL_FUSE
            return kind in NETWORK or is_remote_fuse
    return False


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{00000..00012}`` and ``{a,b}`` as a shell does, the first braces varying slowest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = span.groups()
        width = len(first) if first.startswith("0") else 0
        numbers = range(int(first), int(last) + 1)
        options = [f"{number:0{width}d}" for number in numbers]
    elif "," in inner:
        options = inner.split(",")
    else:
        raise ValueError(
            f"braces in {pattern!r} contain {inner!r}; "
            "expected a range {00000..00012} or list {a,b}"
        )
    head = pattern[: match.start()]
    tails = expand_braces(pattern[match.end() :])
    return [head + middle + tail for middle, tail in itertools.product(options, tails)]


def list_urls(url: str, suffix: str) -> list[str]:
    """URLs of files: braces expanded, then a wildcard or a folder (ending in /) listed by its
    filesystem. Raises FileNotFoundError if nothing matches; plain HTTP servers don't list folders,
    so their files need braces, and so do those at a URL with a query."""
    urls: list[str] = []
    for pattern_url in expand_braces(url):
        place, _, query = pattern_url.partition("?")
        if "*" not in place and place.endswith(suffix):
            urls.append(pattern_url)
            continue
        example = f"{place.rstrip('/')}/{{00000..00099}}{suffix}"
        if query:
            raise FileNotFoundError(
                f"{place} cannot be listed with a query; name its files: "
                f"{example}, with the query at the end"
            )
        filesystem, path = open_filesystem(pattern_url)
        pattern = path if "*" in path else path.rstrip("/") + "/**/*" + suffix
        names = sorted(retried(lambda: filesystem.glob(pattern), pattern_url))  # noqa: B023
        if not names:
            raise FileNotFoundError(
                f"no {suffix} files at {pattern_url}; "
                f"if its server lists no folders, name them: {example}"
            )
        urls += [filesystem.unstrip_protocol(name) for name in names]
    return urls


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for ``url`` and the path on it; ValueError if its protocol is unknown or
    not installed. An HTTP server that is silent for ``timeout()`` seconds is a TimeoutError; other
    protocols have their own."""
    import fsspec

    options: dict[str, Any] = {}
    # aiohttp's own timeout is 300 s for a request of any size
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout
        from fsspec.config import conf

        limits = ClientTimeout(total=None, sock_connect=timeout(), sock_read=timeout())
        configured = conf.get(url.partition(":")[0], {}).get("client_kwargs", {})
        options = {"client_kwargs": {"timeout": limits, **configured}}
    try:
        # cached by fsspec; a forked process gets a fresh one
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


def default_download_folder() -> Path:
    """LLM2CLIP_CACHE, or ``llm2clip/shards`` under XDG_CACHE_HOME or ~/.cache."""
    if "LLM2CLIP_CACHE" in os.environ:
        return Path(os.environ["LLM2CLIP_CACHE"]).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(
        os.path.expanduser("~"), ".cache"
    )
    return Path(home) / "llm2clip" / "shards"


def computed_folder(name: str) -> Path:
    """A folder for what is computed: in LLM2CLIP_CACHE, which may be all that can be written, else
    next to the shards in ``~/.cache/llm2clip``."""
    shards = default_download_folder()
    parent = shards if "LLM2CLIP_CACHE" in os.environ else shards.parent
    return parent / name


@dataclass(frozen=True)
class Downloads:
    """A local folder of copies of files at URLs, downloaded in byte ranges, each retried; a copy
    gets its final name when it is complete, and a lock keeps the processes of a machine from
    downloading a shard twice. (fsspec's file caches have no lock and no limit.)"""

    folder: Path
    # least recently used shards are deleted above this size of the folder; 0: no limit
    limit_bytes: int = 0

    def local_path(self, url: str) -> Path:
        """The path of a copy: a hash of the URL, and its file name reduced to letters, digits and
        ._-"""
        file_name = unquote(urlsplit(url).path).rpartition("/")[2]
        base = re.sub(r"[^A-Za-z0-9._-]", "_", file_name)[-80:].lstrip(".")
        digest = hashlib.sha256(url.encode()).hexdigest()
        return self.folder / f"{digest[:16]}-{base}"

    def fetch(self, url: str) -> Path:
        """The local copy of ``url``, downloaded if there is none. Raises as ``retried`` does."""
        # here, because --help of every command imports this module
        from filelock import FileLock

        target = self.local_path(url)
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.exists():  # another process may have been faster
                    _download(url, target)
            if self.limit_bytes:
                with FileLock(self.folder / ".evict.lock"):
                    self._evict(keep=target)
        try:
            os.utime(target, ns=(time.time_ns(), COPY_TIME))  # mark as used
        except FileNotFoundError:
            return self.fetch(url)  # another process has just evicted it
        return target

    def use(self, path: str, action: Callable[[Path], Result]) -> Result:
        """``action`` on a local file, or on the local copy of a URL, downloaded again if another
        process evicts it."""
        if not is_url(path):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"no file at {path}")
            return action(Path(path))
        while True:
            copy = self.fetch(path)
            try:
                return action(copy)
            except FileNotFoundError:
                if copy.exists():
                    raise

    def read(self, url: str) -> bytes:
        """The bytes at ``url``, without a local copy: for single images. Raises as ``retried``
        does."""
        filesystem, path = open_filesystem(url)
        return retried(lambda: filesystem.cat_file(path), url)

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used shards until the folder fits ``limit_bytes``; open files
        stay readable."""
        statuses: dict[Path, os.stat_result] = {}
        for path in self.folder.iterdir():
            if SHARD.fullmatch(path.name):
                statuses[path] = path.stat()
        size = sum(status.st_size for status in statuses.values())
        for path in sorted(statuses, key=lambda path: statuses[path].st_atime_ns):
            if size <= self.limit_bytes:
                return
            if path != keep:
                size -= statuses[path].st_size
                path.unlink()


def _download(url: str, target: Path) -> None:
    filesystem, path = open_filesystem(url)
    size = retried(lambda: filesystem.info(path), url).get("size")

    def read(start: int) -> bytes:
        if size is None:  # then there are no ranges
            return filesystem.cat_file(path)
        stop = min(start + RANGE, size)
        data = filesystem.cat_file(path, start=start, end=stop)
        if len(data) == size:
            return data[start:]  # a server without ranges sends the entire file
        if len(data) != stop - start:
            raise ConnectionError(
                f"received {len(data)} bytes instead of {stop - start}"
            )
        return data

    incomplete = Path(f"{target}.partial")  # of a killed download: overwritten
    with incomplete.open("wb") as file:
        while size is None or file.tell() < size:
            file.write(
                retried(partial(read, file.tell()), f"{url}, from byte {file.tell()}")
            )
            if size is None:
                break
    fsync(incomplete)
    os.replace(incomplete, target)


class ReadFailedError(ConnectionError):
    """A read that failed too often."""


# an invalid URL or certificate, an option that a protocol doesn't have
USAGE_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ImportError,
    ReadFailedError,
)


def retried(action: Callable[[], Result], what: str) -> Result:
    """``action()``, repeated with growing pauses after transient errors. ``what``: the path or URL
    that it reads. Raises ReadFailedError after too many, and for what is permanent
    FileNotFoundError, PermissionError or the like."""
    what = without_queries(what)
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:  # each protocol has network errors of its own
            failures += 1
            cause: BaseException = error
            # fsspec's HTTP turns any error, a refused connection too, into FileNotFoundError
            if isinstance(error, FileNotFoundError) and error.__cause__:
                cause = error.__cause__
            permanent = _permanent(error, cause, _http_status(cause), what)
            if permanent is error:
                raise
            if permanent:
                raise permanent from error
            reason = f"{what}: {type(cause).__name__}: {without_queries(str(cause))}"
            if isinstance(cause, TimeoutError) and cause.errno is None:
                reason += f" (no answer within {timeout():g} s, {TIMEOUT})"
            if failures >= RETRY.tries:
                problem = f"reading failed {failures} times in a row: {reason}"
                raise ReadFailedError(
                    f"{problem}; rerun the same command to resume"
                ) from error
            headers = vars(cause).get("headers") or {}
            asked_for = seconds_of_retry_after(headers.get("Retry-After", ""))
            pause = max(RETRY.pause(failures), asked_for)
            _retries[0] += 1
            if time.monotonic() - _warned[0] >= WARN_EVERY:
                _warned[0] = time.monotonic()
                log.warning(
                    "%s; retrying in %.1f s (%d of %d)",
                    reason,
                    pause,
                    failures,
                    RETRY.tries,
                )
            time.sleep(pause)


def _http_status(error: BaseException) -> int:
    """That an error of a protocol's library carries; 0: none."""
    for name in ("status", "code"):  # aiohttp's, gcsfs's
        value = vars(error).get(name)
        if isinstance(value, int):
            return value
    return 0


def _permanent(
    error: Exception, cause: BaseException, status: int, what: str
) -> Exception | None:
    """What to raise for an error that no retry mends; None for a transient one."""
    http_status = f" (HTTP {status})" if status else ""
    if status in (401, 403, 407) or isinstance(cause, PermissionError):
        return PermissionError(
            f"access denied to {what}{http_status}; check its permissions, token or expiry date"
        )
    if status in (404, 410) or (not status and isinstance(cause, FileNotFoundError)):
        return FileNotFoundError(f"no file at {what}{http_status}")
    if status >= 500 or status in (408, 425, 429):
        return None
    if status:
        refused = without_queries(str(cause))
        return ConnectionError(f"the server refuses {what}: {refused}")
    if isinstance(cause, USAGE_ERRORS):
        return error
    import ssl  # here, because --help of every command imports this module

    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
        # below 0: of a name's look-up
        if cause.errno is None or cause.errno < 0 or cause.errno in TRANSIENT:
            return None
        return error
    return None


def take_retries() -> int:
    """Retries of this process since the last call."""
    count = _retries[0]
    _retries[0] = 0
    return count


os.register_at_fork(after_in_child=take_retries)  # the parent's are not the child's


class RetryingFile:
    """A file read by position, so that forked processes can share it, and opened again after a
    transient error."""

    def __init__(
        self, path: str | Path, open_file: Callable[[], int] | None = None
    ) -> None:
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
            descriptor = self._descriptor
            self._descriptor = -1
            os.close(descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer at the end of the file."""
        data = self._retried(lambda descriptor: os.pread(descriptor, size, offset))
        if (
            0 < len(data) < size
        ):  # a signal or a network file system may cut a read short
            data += self.read(size - len(data), offset + len(data))
        return data

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


# Files derived from data, and the stamps that say whether they are current.


@dataclass(frozen=True)
class SideFolder:
    """Where files derived from the data of one folder or URL are."""

    main: Path
    spare: Path  # used if ``main`` can't be written

    @classmethod
    def of(cls, data_path: str, spare_folder: Path) -> SideFolder:
        """For data in the local folder, or below the URL, ``place``."""
        name = data_path if is_url(data_path) else os.path.abspath(data_path)
        spare = spare_folder / f"kept-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return cls(spare if is_url(data_path) else Path(data_path) / FOLDER, spare)

    def paths(self, name: str) -> tuple[Path, Path]:
        """Where a file may be."""
        return self.main / name, self.spare / name

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Call ``write`` with a temporary path and rename it to ``name``; returns where. Raises
        OSError."""
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
    def lock(self, doing: str) -> Iterator[Path | None]:
        """Hold the folder's lock, so that one process does ``doing`` and the others find it done.
        Without a folder that can be written, or a file system with locks, nobody waits. Yields the
        lock's folder."""
        from filelock import FileLock, Timeout

        for path in self.paths("lock"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path)
                lock.acquire(timeout=0)
            except Timeout:
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(
                        f"waiting for another process to {without_queries(doing)} ({path})",
                        file=sys.stderr,
                    )
                lock.acquire(poll_interval=0.2)
            except (OSError, NotImplementedError):
                continue
            try:
                yield path.parent
            finally:
                lock.release()
            return
        yield None

    def read_json(self, name: str) -> dict[str, Any]:
        """The entries of a JSON file in both places; {} for a damaged one."""
        entries: dict[str, Any] = {}
        for path in self.paths(name):
            try:
                entries |= json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                log.warning(
                    "cannot read %s (%s); its contents are computed again", path, error
                )
        return entries

    def add_json(self, name: str, entries: dict[str, Any]) -> None:
        """Add or replace entries of a JSON file. The caller holds the lock."""
        text = canonical_json({**self.read_json(name), **entries})
        try:
            self.write(name, lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            log.warning(
                "cannot write %s (%s); the next start computes it again",
                self.main / name,
                error,
            )


# what listing a folder fails with if no file can have its path
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def stamps_of(paths: Sequence[str]) -> list[Stamp | None]:
    """Size and time of each file, None for a missing one; folders are listed, which network disks
    answer at once."""
    stamps: dict[str, Stamp | None] = dict.fromkeys(paths)
    for folder in {os.path.dirname(path) for path in paths}:
        try:
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    if path in stamps:
                        with suppress(FileNotFoundError):  # a link to nothing
                            stamps[path] = stamp_of(entry)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
    return [stamps[path] for path in paths]


def stamp_of(file: Path | os.DirEntry[str]) -> Stamp:
    """Size and time of a file. Raises FileNotFoundError."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
