"""Errors of disks and servers that pass: which they are, how they are retried, and how often that happened.

An error passes if the same read may succeed later: an input/output error, a stale handle of NFS, a timeout, a broken
connection, HTTP 5xx, 408, 425 and 429. A missing file, a denied access and a full disk don't pass.
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
