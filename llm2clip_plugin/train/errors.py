"""What ends a run early. Standard library only, so that the command line knows it without torch."""

import os
import re
import socket


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
    """The loss or the gradient is not a number; raised on all ranks, its message names the batch's samples."""


class FirstRankError(ValueError):
    """Rank 0 has raised an error that a user can correct, and prints it; raised on the other ranks."""


def lost_rank(error: RuntimeError) -> str:
    """The message for a collective that failed because another rank is gone; "" for any other error.

    torch raises a DistError for NCCL and the store, a plain RuntimeError for gloo.
    """
    if "gloo/" not in str(error) and not any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = re.sub(r"^\[[^]]*\] *", "", lines[0]).split(". This is typically")[0]  # gloo's source line and advice
    return (
        f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} lost the connection to another rank: {reason}. "
        "A process or host has ended or hangs, or the network failed; look for the first error of the other ranks. "
        "Rerun the same command, on any number of ranks: training resumes from its last checkpoint"
    )
