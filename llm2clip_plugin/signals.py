"""Signals: what ends a process at once while it loads, and what asks a run to save and stop.
Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llm2clip_plugin.processes import child_environment, end_children

# of a run that loads: it ends at once, as there is nothing to save
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
        if name == "SIGINT":
            return "interrupted"
        return f"{name}: ended before there was anything to save"


@contextmanager
def interrupts_end_loading() -> Iterator[None]:
    """A signal of ENDING ends this process, until `loaded` is called or the block is left."""
    global _waiting, _loading
    _loading = True
    if _waiting is None and os.environ.get("WORLD_SIZE", "1") != "1":
        _waiting = threading.Thread(target=_wait, daemon=True)
        # threads that start from here on block them, too
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        _waiting.start()
    try:
        yield
    finally:
        loaded()


def is_loading() -> bool:
    """Whether there is nothing to save yet."""
    return _loading


def loaded() -> None:
    """From now on a signal is left to the handlers of Python: there is something to save. Called by
    the main thread."""
    global _waiting, _loading
    _loading = False
    thread = _waiting
    _waiting = None
    if thread is not None and thread.ident is not None:
        signal.pthread_kill(thread.ident, signal.SIGINT)
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def attend(words: list[str]) -> int:
    """Run a program, with the signals that this process gets; its exit status, 128 + N after signal
    N."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the whole group
            process.send_signal(number)

    process = subprocess.Popen(words, env=child_environment())
    before = {number: signal.signal(number, forward) for number in ENDING}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else status


def _wait() -> None:
    number = signal.sigwait(ENDING)
    if _waiting is threading.current_thread():
        ended = Interrupted(number)
        if os.environ.get("RANK", "0") == "0":
            line = "\n" if os.isatty(2) else ""
            os.write(2, f"{line}{ended}\n".encode())
        end_children()
        os._exit(ended.status)


# SIGHUP: the terminal or connection is gone; SIGUSR1: Slurm's warning before the time limit
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once this rank has been requested to stop: by a signal, or as the `deepspeed` command
    that started it has ended. (On one node a SIGTERM ends that command without its ranks, which
    would train on in the background.)"""

    def __init__(self) -> None:
        import psutil  # of accelerate's

        self._gone = psutil.NoSuchProcess
        self.signals: list[int] = []
        # set by deepspeed.launcher.launch, whose parent is that command
        self._launcher = (
            psutil.Process().parent() if "LOCAL_SIZE" in os.environ else None
        )
        self._command = self._launcher.ppid() if self._launcher is not None else 0

    def __bool__(self) -> bool:
        return bool(self.signals) or self._launcher_ended()

    def _launcher_ended(self) -> bool:
        try:  # once a step; finding the launcher anew takes five times as long
            return self._launcher is not None and self._launcher.ppid() != self._command
        except self._gone:
            return True

    @property
    def reason(self) -> str:
        """The signal's name or another cause, for messages."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        if self._launcher_ended():
            return "the launcher ended"
        return "a signal on another rank"


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the signals of STOPPING and print a notice of the first instead of exiting; a second
    SIGINT raises KeyboardInterrupt. While the run is loading there is nothing to save, and a signal
    raises Interrupted."""
    request = StopRequest()
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if is_loading() and os.getpid() == owner and number != signal.SIGUSR1:
            raise Interrupted(number)
        if number == signal.SIGINT and number in request.signals:
            raise KeyboardInterrupt
        request.signals.append(number)
        # loader processes are forked with this handler, and Slurm signals all processes of a step
        speaks = os.environ.get("RANK", "0") == "0" and os.getpid() == owner
        if speaks and len(request.signals) == 1:
            # below the bar
            name = signal.Signals(number).name
            line = "\n" if os.isatty(2) else ""
            notice = (
                f"{line}{name}: saving and stopping after this step; "
                "press Ctrl-C twice to stop now\n"
            )
            os.write(2, notice.encode())

    previous = {}
    for number in STOPPING:
        # nohup ignores SIGHUP
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        previous[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
