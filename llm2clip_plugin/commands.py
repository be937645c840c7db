"""The commands that messages show: complete, and quoted so that a shell reads them as printed."""

import dataclasses
import shlex
from collections.abc import Iterable
from typing import Any

from llm2clip_plugin.options.command import NAMES


def command(*words: object) -> str:
    """``llm2clip WORDS``, each word quoted if a shell would split or change it."""
    return shlex.join(["llm2clip", *map(str, words)])


def changed_options(config: Any, names: Iterable[str], *, prefix: str = "") -> list[str]:
    """The options that set the fields ``names`` of a dataclass, for those that differ from their defaults.

    prefix: of a section, ``data.`` for --data.fields.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    words: list[str] = []
    for name in names:
        value = getattr(config, name)
        if value == defaults[name]:
            continue
        option = NAMES.get(name, f"{prefix}{name}".replace("_", "-"))
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--{prefix}no-{name}".replace("_", "-"))
        elif isinstance(value, tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words
