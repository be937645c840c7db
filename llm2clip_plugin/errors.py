"""Errors that name a file and its fix, and what ends a run early with its exit status. Standard
library only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager


class ContractError(ValueError):
    """A file is damaged or does not match what its reader expects; the message names the file and
    the fix."""


@contextmanager
def errors_about(path: object, *, fix: str = "") -> Iterator[None]:
    """What a library raises about a file of ours, of any type, as a ContractError that names the
    file. OSError, ContractError, ImportError, a lack of memory and errors of a GPU pass: they name
    the file already, or a cause outside it."""
    try:
        yield
    except (OSError, ContractError, ImportError):
        raise
    except Exception as error:
        if (
            isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        ):  # torch's
            raise
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else ""
        if reason.endswith(":"):  # the next line says what it is
            reason = " ".join(lines[:2])
        kind = "" if isinstance(error, ValueError) and reason else type(error).__name__
        reason = ": ".join(part for part in (kind, reason) if part)
        advice = f"; {fix}" if fix else ""
        raise ContractError(f"{path} cannot be used ({reason}){advice}") from error


# What ends a run early. Exit statuses: 0 done; 1 failed, a rerun may succeed; 2 wrong input; 3 a
# non-finite loss or gradient; 75 saved and stopped before the end, to be started again; 129, 130,
# 143 a signal before there was anything to save.


class SameOnAllRanksError(RuntimeError):
    """Raised on every rank with the same message, which rank 0 prints."""

    status = 1  # exit status
    label = "error: "  # before the message


class DisagreementError(SameOnAllRanksError):
    """The ranks differ in what they must have in common; the message names the values, hosts and
    ranks."""

    status = 2


class RankFailedError(SameOnAllRanksError):
    """Another rank has failed, and prints its error."""


class StoppedError(SameOnAllRanksError):
    """The run has saved and stopped before its end, as a signal requested; the same command resumes
    it."""

    # EX_TEMPFAIL: no error, try again; not 0, or `train-tower && export` would export a part of a
    # run
    status = 75
    label = ""


class NonFiniteLossError(SameOnAllRanksError):
    """The loss or the gradient of a batch is not a number, and the weights were not updated; raised
    on all ranks."""

    status = 3  # a rerun would meet the same batch

    def __init__(
        self,
        what: str,
        advice: str,
        *,
        outcome: str = "The weights were not updated and the last checkpoint is unchanged",
    ) -> None:
        """what: names the batch's samples."""
        super().__init__(f"{what}. {outcome}; {advice}")
        self.what = what


# of errors that a rerun would meet again
FINAL_STATUSES = (DisagreementError.status, NonFiniteLossError.status)


class FirstRankError(ValueError):
    """Raised on the other ranks when rank 0 has an error that a user can correct, and prints it."""


def lost_rank(error: RuntimeError) -> str:
    """The message for a collective that failed because another rank is gone; "" for any other
    error."""
    # torch raises a DistError for NCCL and the store, a plain RuntimeError for gloo
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "gloo/" not in str(error) and "DistError" not in kinds:
        return ""
    if "EADDRINUSE" in str(error):
        return (
            f"port {os.environ.get('MASTER_PORT')} is in use by another process; choose another "
            "with --master_port"
        )
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} lost the connection to "
        f"another rank: {reason}. Look for the first error of the others, and rerun the same "
        "command: it resumes, on any number of ranks"
    )
