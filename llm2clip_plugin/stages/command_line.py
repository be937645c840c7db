"""What the stages' command lines share: settings over a recipe, and the launcher's variables."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm2clip_plugin.options.command import Command, Words

Settings = TypeVar("Settings")

# an option that is given -> the recipe's setting that would take its place, and the value that turns it off
REPLACES: dict[str, tuple[str, Any]] = {
    "train.num_train_epochs": ("train.max_steps", 0),
    "optim.warmup_ratio": ("optim.warmup_steps", 0),
    "optim.warmup_steps": ("optim.warmup_ratio", 0.0),
}


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(dry_run: bool, plan: Callable[[], str], train: Callable[[], Path], result: str) -> int:
    """Print the plan, or train and print where the ``result`` is, in both cases on rank 0; returns exit status 0."""
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if first_rank:
        print(f"{result}: {path}")
    return 0


def read_settings(
    command: Command[Settings], argv: Sequence[str], default: Callable[[dict[str, str]], Settings]
) -> Settings:
    """The settings of a training stage's command line.

    ``default``: what the options override, from the words of the extra options (--recipe ...).
    """
    words = command.read(argv)
    given = words.values
    replaced = dict(REPLACES[name] for name in given if name in REPLACES and REPLACES[name][0] not in given)
    return command.build(Words({**replaced, **given}, words.extras), default(words.extras))
