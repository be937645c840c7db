"""A command whose options are the fields of a dataclass: its words become settings, ``--help`` becomes text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llm2clip_plugin.options.declared import Declared
from llm2clip_plugin.options.help import help_text
from llm2clip_plugin.options.names import HELP, HELP_ALL, joined, normal
from llm2clip_plugin.options.settings import TRUTH, build, convert, takes_several

Settings = TypeVar("Settings")

OPTION = re.compile(r"--[A-Za-z]")
HALF = ("bf16", "fp16")  # the Trainer's flags for what --precision says
PRECISION = "train.precision"


@dataclass(frozen=True)
class Words:
    """A command line, sorted."""

    values: dict[str, Any]  # field -> value
    extras: dict[str, str]  # name of an extra option -> its word


class Command(Declared[Settings]):
    """A command that reads its words."""

    def parse(self, argv: Sequence[str]) -> Settings:
        """The settings of a command line. Prints --help and exits with status 0 if it is among the words.

        Raises ValueError for an unknown option, a missing or unusable value, and for what the settings refuse.
        """
        return self.build(self.read(argv))

    def build(self, words: Words, default: Settings | None = None) -> Settings:
        """``default`` with the values that a command line gives; raises ValueError as ``parse`` does."""
        try:
            return build(self.settings, words.values, default)
        except KeyError as error:
            raise ValueError(f"{self.placeholder(error.args[0])} is missing; {self.usage}") from error

    def read(self, argv: Sequence[str]) -> Words:
        """The values that a command line gives. Prints --help and exits with status 0 if it is among the words."""
        if any(word in (*HELP, *HELP_ALL) for word in argv):
            print(help_text(self, everything=any(word in HELP_ALL for word in argv)))
            raise SystemExit(0)
        words = list(argv)
        values: dict[str, Any] = {}
        extras: dict[str, str] = {}
        bare: list[str] = []
        half: set[str] = set()
        while words:
            word = words.pop(0)
            if not OPTION.match(word):
                bare.append(word)
                continue
            name, equals, value = word.partition("=")
            following = [value] if equals else []
            if normal(name) in self.extras:
                extras[normal(name)] = self._one(name, following, words)
            elif normal(name) in HALF and PRECISION in self.types:
                if self._truth(following, words):
                    half.add(normal(name))
            elif normal(name) != "local-rank":
                option, positive = self._field(name)
                values[option] = self._value(option, name, positive, following, words)
            else:
                self._one(name, following, words)  # from the DeepSpeed launcher, which sets LOCAL_RANK too
        if len(half) > 1:
            raise ValueError("--bf16 and --fp16 exclude each other; give one")
        if half:
            values[PRECISION] = half.pop()
        return Words({**self._arguments(bare, values), **values}, extras)

    def _field(self, name: str) -> tuple[str, bool]:
        """The field of an option, and False for --no-FLAG. Raises ValueError for an unknown one."""
        known, given = self.names.fields, normal(name)
        if given in known:
            return known[given], True
        section, dot, leaf = given.rpartition(".")
        flag = known.get(f"{section}{dot}{leaf.removeprefix('no-')}", "")
        if leaf.startswith("no-") and self.types.get(flag) is bool:
            return flag, False
        no = {
            option: field for option, field in known.items() if leaf.startswith("no-") and self.types.get(field) is bool
        }
        negated = [f"{at}{dot}no-{flag}" for at, dot, flag in (option.rpartition(".") for option in no)]
        unknown = f"unknown option {name}{self.names.nearest(name, [*self.extras, *negated])}"
        raise ValueError(joined(unknown, f"`llm2clip {self.name} --help-all` lists all"))

    def _value(self, option: str, name: str, positive: bool, following: list[str], words: list[str]) -> Any:
        """The option's value, from its own word (``--name=value``) or those that follow."""
        hint, flag = self.types[option], name
        if hint is bool:
            return self._truth(following, words) is positive
        if not takes_several(hint):
            return convert(hint, [self._one(name, following, words)], flag)
        if not following:
            while words and not OPTION.match(words[0]):
                following.append(words.pop(0))
        if following == [""] or (option.endswith("report_to") and following == ["none"]):  # the Trainer's "none"
            following = []
        return convert(hint, following, flag)

    @staticmethod
    def _truth(following: list[str], words: list[str]) -> bool:
        """The value of a flag, which may stand alone."""
        if not following and words and words[0].lower() in TRUTH:
            following = [words.pop(0)]
        return convert(bool, following, "a flag") if following else True

    @staticmethod
    def _one(name: str, following: list[str], words: list[str]) -> str:
        if following:
            return following[0]
        if not words or OPTION.match(words[0]):
            raise ValueError(f"{name} needs a value")
        return words.pop(0)

    def _arguments(self, bare: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """The words without an option as the values of ``arguments``."""
        given, rest = {}, list(bare)
        for name in self.arguments:
            if rest and name not in values:
                several = takes_several(self.types[name])
                given[name] = convert(self.types[name], rest if several else rest[:1], self.placeholder(name))
                rest = [] if several else rest[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; {self.usage}")
        return given
