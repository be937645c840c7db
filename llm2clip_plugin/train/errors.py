"""What ends a run early. Standard library only, so that the command line knows it without torch.

Exit statuses: 0 done; 1 failed, a rerun may succeed; 2 wrong input; 3 a non-finite loss or gradient; 75 saved and
stopped before the end, to be started again; 129, 130, 143 a signal before there was anything to save.
"""

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
