"""Commands and names as text, for messages."""

import dataclasses
import shlex
from collections.abc import Iterable
from typing import Any

from llm2clip_plugin.options.setting import Setting, declared_by


def unknown(kind: str, name: object, known: Iterable[object], *, also: str = "") -> str:
    """``unknown recipe 'bse'; known: base, quickstart``; ``also`` follows the known names."""
    return f"unknown {kind} {name!r}; known: {', '.join(map(str, known))}{also}"


def command(*words: object) -> str:
    """``llm2clip WORDS``, each word quoted if a shell would split or change it."""
    return shlex.join(["llm2clip", *map(str, words)])


def negative(option: str) -> str:
    """``loss.no-mask`` of ``loss.mask``."""
    section, dot, last = option.rpartition(".")
    return f"{section}{dot}no-{last}"


def changed_options(config: Any, names: Iterable[str]) -> list[str]:
    """The options that set the fields ``names`` of a dataclass, for those that differ from their
    defaults."""
    items = {item.name: item for item in dataclasses.fields(config)}
    words: list[str] = []
    for name in names:
        value = getattr(config, name)
        if value == items[name].default:
            continue
        declared = declared_by(items[name]) or Setting()
        option = (declared.option or name).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option if value else negative(option)}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    return words
