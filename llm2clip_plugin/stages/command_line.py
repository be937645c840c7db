"""What the stages' command lines share: options that are read before the others, tyro, and the launcher's variables."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm2clip_plugin.stages.explicit import Unused, given_options, make_room, refuse_unused, unused_in_training
from llm2clip_plugin.typed_options import parse_typed

Settings = TypeVar("Settings")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(dry_run: bool, plan: Callable[[], str], train: Callable[[], Path | None], result: str) -> int:
    """Print the plan, or train and print where the result is, in both cases on rank 0; returns exit status 0.

    ``result``: what to print, with {} for the path. A run that a SIGTERM stopped and saved has none and prints nothing.
    """
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if path is not None and first_rank:
        print(result.format(path))
    return 0


def split_options(argv: Sequence[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """The values of the options ``--NAME VALUE`` ("" if absent), and the other words.

    ``--local_rank``, which the DeepSpeed launcher adds, is dropped: LOCAL_RANK says the same.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--local_rank", "--local-rank", dest="_local_rank")
    values, words = parser.parse_known_args(argv)
    return {name: getattr(values, name) for name in names}, words


def override(
    kind: type[Settings],
    words: Sequence[str],
    *,
    command: str,
    about: str,
    default: Settings | None = None,
    sections: bool = True,
    unused: Sequence[Unused[Settings]] | None = None,
) -> Settings:
    """``default`` with the fields that a command line sets, as --SECTION.FIELD or (``sections`` False) as --FIELD.

    unused: of a training stage: which of its options have no effect, and when. Raises ValueError for an unknown option,
    a value that is refused or one without an effect, ModuleNotFoundError without tyro, which the train extra installs.
    """
    import tyro

    given = given_options(kind, words, sections=sections) if unused is not None else set()
    options: dict[str, Any] = {} if default is None else {"default": make_room(default, given)}
    form: Any = kind if sections else tyro.conf.OmitArgPrefixes[kind]
    config: Settings = parse_typed(form, words, prog=f"llm2clip {command}", description=about, **options)
    if unused is not None:
        refuse_unused(config, given, [*unused_in_training(given), *unused], sections=sections)
    return config
