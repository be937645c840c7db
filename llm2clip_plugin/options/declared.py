"""What a command declares: its settings, what its options are called, and what --help says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from llm2clip_plugin.options.names import Names
from llm2clip_plugin.options.settings import field_types, takes_several

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An option that is no setting, and takes one value: ``--recipe NAME``."""

    metavar: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Declared(Generic[Settings]):
    """A command and the settings that it reads."""

    name: str  # as typed after llm2clip
    example: str  # a complete command line
    about: str  # what the command does
    settings: type[Settings]
    arguments: tuple[str, ...] = ()  # fields that stand without an option, in this order; the last may take several
    everyday: tuple[str, ...] = ()  # fields and extras that --help lists, the others --help-all; (): all
    shown: Mapping[str, str] = field(default_factory=dict)  # see Names
    also: Mapping[str, str] = field(default_factory=dict)  # see Names
    extras: Mapping[str, Extra] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()  # fields without an option
    # makes the settings of a command line without options, whose values --help shows; None: the fields' own defaults
    default: Callable[[], Settings] | None = None

    @cached_property
    def types(self) -> dict[str, Any]:
        """Type of every field that has an option."""
        return {name: hint for name, hint in field_types(self.settings).items() if name not in self.hidden}

    @cached_property
    def names(self) -> Names:
        """The names of the options."""
        return Names(self.types, self.shown, self.also)

    def placeholder(self, name: str) -> str:
        """How usage and errors write a field: DATA, or --llm."""
        return self.names.shown[name].upper() if name in self.arguments else self.names.flag(name)

    @property
    def usage(self) -> str:
        """One line: ``usage: llm2clip train-tower DATA [DATA ...] [options]``."""
        words = [self.placeholder(name) for name in self.arguments]
        if self.arguments and takes_several(self.types[self.arguments[-1]]):
            words.append(f"[{words[-1]} ...]")
        return " ".join(["usage: llm2clip", self.name, *words, "[options]"])
