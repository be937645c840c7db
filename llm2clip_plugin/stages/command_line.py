"""What the stages' commands share."""

import os
from collections.abc import Callable
from pathlib import Path


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(dry_run: bool, plan: Callable[[], str], train: Callable[[], Path], result: str) -> int:
    """Print the plan, or train and print where the result is, in both cases on rank 0; returns exit status 0.

    ``result``: what to print, with {} for the path.
    """
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if first_rank:
        print(result.format(path))
    return 0
