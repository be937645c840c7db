"""What the stages' command lines share: settings over a recipe, and the launcher's variables."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.stages.explicit import Unused, make_room, refuse_unused, unused_in_training

Settings = TypeVar("Settings")


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


def read_settings(
    command: Command[Settings],
    argv: Sequence[str],
    default: Callable[[dict[str, str]], Settings],
    unused: Sequence[Unused[Settings]],
) -> Settings:
    """The settings of a training stage's command line.

    default: what the options override, from the words of the extra options (--recipe ...); unused: which options have
    no effect, and when. Raises ValueError for an unknown option and for one without an effect.
    """
    words = command.read(argv)
    given = words.values
    config = command.build(words, make_room(default(words.extras), given))
    refuse_unused(config, given, [*unused_in_training(given), *unused], command.names)
    return config
