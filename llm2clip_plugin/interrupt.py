"""A signal while a run loads ends it at once, as there is nothing to save. Standard library only.

One process raises Interrupted. A rank cannot: the exception would be raised in whatever the main thread does there: an
import that swallows it, a rendezvous in C++ that prints its stack and goes on, a collective that fails because the
other ranks are gone. So its main thread blocks the signals, and a thread that does nothing else waits for them.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_loading = False
_waiting: threading.Thread | None = None


class Interrupted(KeyboardInterrupt):
    """SIGTERM, SIGHUP or Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.status = 128 + number  # as a shell says it

    def __str__(self) -> str:
        name = signal.Signals(self.status - 128).name
        return "interrupted" if name == "SIGINT" else f"{name}: ended before there was anything to save"


@contextmanager
def interrupts_end_loading() -> Iterator[None]:
    """A signal of ENDING ends this process, until `loaded` is called or the block is left."""
    global _waiting, _loading
    _loading = True
    if _waiting is None and os.environ.get("WORLD_SIZE", "1") != "1":
        _waiting = threading.Thread(target=_wait, daemon=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # threads that start from here on block them, too
        _waiting.start()
    try:
        yield
    finally:
        loaded()


def is_loading() -> bool:
    """Whether there is nothing to save yet."""
    return _loading


def loaded() -> None:
    """From now on a signal is left to the handlers of Python: there is something to save. Called by the main thread."""
    global _waiting, _loading
    _loading = False
    thread, _waiting = _waiting, None
    if thread is not None and thread.ident is not None:
        signal.pthread_kill(thread.ident, signal.SIGINT)
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def attend(words: list[str]) -> int:
    """Run a program, with the signals that this process gets; its exit status, 128 + N after signal N."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the whole group
            process.send_signal(number)

    process = subprocess.Popen(words)
    before = {one: signal.signal(one, forward) for one in ENDING}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else status


def end_children() -> None:
    """Kill the processes that this one has started with multiprocessing; those of a loader ignore SIGTERM."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()


def _wait() -> None:
    number = signal.sigwait(ENDING)
    if _waiting is threading.current_thread():
        ended = Interrupted(number)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{chr(10) * os.isatty(2)}{ended}\n".encode())
        end_children()
        os._exit(ended.status)
