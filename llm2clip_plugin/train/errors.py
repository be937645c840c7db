"""What ends a run early; without torch, so that the command line knows it.

Exit statuses: 0 done; 1 failed, a rerun may succeed; 2 wrong input; 3 a non-finite loss or gradient; 75 saved and
stopped before the end, to be started again; 129, 130, 143 a signal before there was anything to save.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from llm2clip_plugin.console import Interrupted, is_loading


class SameOnAllRanksError(RuntimeError):
    """Raised on every rank with the same message, which the command line prints once, from rank 0."""

    status = 1  # exit status
    label = "error: "  # before the message


class DisagreementError(SameOnAllRanksError):
    """The ranks differ in what they must have in common; the message names the values, hosts and ranks."""

    status = 2


class RankFailedError(SameOnAllRanksError):
    """Another rank has failed, and prints its error."""


class StoppedError(SameOnAllRanksError):
    """The run has saved and stopped before its end, as a signal requested; the same command resumes it."""

    status = 75  # EX_TEMPFAIL: no error, try again; not 0, or `train-tower && export` would export a part of a run
    label = ""


class NonFiniteLossError(SameOnAllRanksError):
    """The loss or the gradient of a batch is not a number, and the weights were not updated; raised on all ranks."""

    status = 3  # a rerun would meet the same batch

    def __init__(self, what: str, advice: str) -> None:
        """what: names the batch's samples."""
        super().__init__(f"{what}. The weights were not updated and the last checkpoint is unchanged; {advice}")
        self.what = what


FINAL_STATUSES = (DisagreementError.status, NonFiniteLossError.status)  # of errors that a rerun would meet again


class FirstRankError(ValueError):
    """Rank 0 has raised an error that a user can correct, and prints it; raised on the other ranks."""


def lost_rank(error: RuntimeError) -> str:
    """The message for a collective that failed because another rank is gone; "" for any other error."""
    # torch raises a DistError for NCCL and the store, a plain RuntimeError for gloo
    if "gloo/" not in str(error) and not any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return ""
    if "EADDRINUSE" in str(error):
        return f"port {os.environ.get('MASTER_PORT')} is in use by another process; choose another with --master_port"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} lost the connection to another rank: {reason}. "
        "Look for the first error of the others, and rerun the same command: it resumes, on any number of ranks"
    )


# SIGHUP: the terminal or connection is gone; SIGUSR1: Slurm's warning before the time limit
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once this rank has been requested to stop: by a signal, or as the `deepspeed` command that started it has
    ended. (On one node a SIGTERM ends that command without its ranks, which would train on in the background.)"""

    def __init__(self) -> None:
        self.signals: list[int] = []
        # set by deepspeed.launcher.launch, whose parent is that command
        self._launcher = psutil.Process().parent() if "LOCAL_SIZE" in os.environ else None
        self._command = self._launcher.ppid() if self._launcher is not None else 0

    def __bool__(self) -> bool:
        return bool(self.signals) or self._launcher_ended()

    def _launcher_ended(self) -> bool:
        try:  # once a step; finding the launcher anew takes five times as long
            return self._launcher is not None and self._launcher.ppid() != self._command
        except psutil.NoSuchProcess:
            return True

    @property
    def reason(self) -> str:
        """The signal's name or another cause, for messages."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        return "the launcher ended" if self._launcher_ended() else "a signal on another rank"


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the signals of STOPPING and print a notice of the first instead of exiting; a second SIGINT raises
    KeyboardInterrupt. While the run is loading there is nothing to save, and a signal raises Interrupted."""
    request, owner = StopRequest(), os.getpid()

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
