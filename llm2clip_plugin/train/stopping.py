"""What asks a run to stop: SIGTERM, Ctrl-C, and the end of the `deepspeed` command that started it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """True once this rank was asked to stop; ``reason`` says by what."""

    def __init__(self, launcher_ended: Callable[[], bool] = lambda: False) -> None:
        self.signals: list[int] = []
        self._launcher_ended = launcher_ended

    def __bool__(self) -> bool:
        return bool(self.signals) or self._launcher_ended()

    @property
    def reason(self) -> str:
        """For the user."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        return "the launcher ended" if self._launcher_ended() else "a signal on another rank"


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collect SIGTERM and SIGINT instead of dying, and say so; a second SIGINT interrupts as usual."""
    request = StopRequest(watch_launcher())

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in request.signals:
            raise KeyboardInterrupt
        request.signals.append(number)
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(
                2, f"\n{name}: the run saves and stops at the end of this step; Ctrl-C twice ends it now\n".encode()
            )

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_launcher() -> Callable[[], bool]:
    """A function that tells whether the `deepspeed` command above this rank has ended since; never without one.

    On one node it dies of a SIGTERM without a word to its ranks, which two processes below would train on unseen.
    """
    if "LOCAL_SIZE" not in os.environ:  # DeepSpeed's launcher sets it
        return lambda: False
    import psutil  # comes with DeepSpeed

    between = psutil.Process().parent()  # deepspeed.launcher.launch
    above = between.ppid() if between is not None else 0

    def ended() -> bool:
        try:
            return between is not None and between.ppid() != above
        except psutil.NoSuchProcess:
            return True

    return ended
