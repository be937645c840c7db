"""Transient errors of disks and servers: which they are, how reads are retried, and how often that happened.

An error is transient if the same read may succeed later: an input/output error, a stale handle of NFS, a timeout, a
broken connection, HTTP 5xx, 408, 425 and 429. A missing file, a denied access and a full disk are not.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llm2clip_plugin.outside.pauses import Retry, seconds_of_retry_after
from llm2clip_plugin.outside.timeouts import TIMEOUT, timeout

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
