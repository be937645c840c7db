"""Requests to stop a run: SIGTERM, SIGHUP, Ctrl-C, SIGUSR1, or the `deepspeed` command that started it has ended."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llm2clip_plugin.interrupt import Interrupted, is_loading

# SIGHUP: the terminal or connection is gone; SIGUSR1: Slurm's warning before the time limit
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once this rank has been requested to stop."""

    def __init__(self, launcher_ended: Callable[[], bool] = lambda: False) -> None:
        self.signals: list[int] = []
        self._launcher_ended = launcher_ended

    def __bool__(self) -> bool:
        return bool(self.signals) or self._launcher_ended()

    @property
    def reason(self) -> str:
        """The signal's name or another cause, for messages."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        return "the launcher ended" if self._launcher_ended() else "a signal on another rank"


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the signals of STOPPING and print a notice of the first instead of exiting.

    After a Ctrl-C, which reaches the ranks too, DeepSpeed's launcher sends them a SIGTERM. While the run is loading
    there is nothing to save, and a signal raises Interrupted; later a second SIGINT raises KeyboardInterrupt.
    """
    request, owner = StopRequest(watch_launcher()), os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if is_loading() and os.getpid() == owner and number != signal.SIGUSR1:
            raise Interrupted(number)
        if number == signal.SIGINT and number in request.signals:
            raise KeyboardInterrupt
        request.signals.append(number)
        # loader processes are forked with this handler, and Slurm signals all processes of a step
        if os.environ.get("RANK", "0") == "0" and os.getpid() == owner and len(request.signals) == 1:
            name, line = signal.Signals(number).name, "\n" if os.isatty(2) else ""  # below the bar
            os.write(2, f"{line}{name}: saving and stopping after this step; press Ctrl-C twice to stop now\n".encode())

    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP]
    previous = {number: signal.signal(number, note) for number in handled}  # nohup ignores SIGHUP
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def watch_launcher() -> Callable[[], bool]:
    """A function that returns whether the `deepspeed` command that started this rank has ended; False without one.

    On one node, a SIGTERM ends that command without ending its ranks, which would train on in the background.
    """
    if "LOCAL_SIZE" not in os.environ:  # DeepSpeed's launcher sets it
        return lambda: False
    import psutil  # comes with DeepSpeed

    launcher = psutil.Process().parent()  # deepspeed.launcher.launch
    command = launcher.ppid() if launcher is not None else 0

    def ended() -> bool:
        try:
            return launcher is not None and launcher.ppid() != command
        except psutil.NoSuchProcess:
            return True

    return ended
