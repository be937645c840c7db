"""What ends a run early. Standard library only, so that the command line knows it without torch."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is not a number; raised on all ranks, its message names the batch's samples."""
