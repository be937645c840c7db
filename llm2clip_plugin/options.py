"""Options of the commands: one vocabulary, from the words of a command line to settings, and the text of --help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import inspect
import itertools
import json
import linecache
import os
import re
import shlex
import sys
import textwrap
import tokenize
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NoReturn, TypeVar

from llm2clip_plugin.hub import can_only_be_a_path

# Names that several commands choose for the same fields.

READ_NAMES = {  # of data.sources.base.ReadConfig: field -> name
    "images": "image-folder",
    "kinds": "kinds",
    "languages": "languages",
}
SELECTION = (
    "weight",
    "shuffle_window",
    "kinds",
    "languages",
)  # of SourceConfig; hidden where all captions are read
TRAINING_NAMES = {  # of the training stages: field, or section -> name
    "output_dir": "output",
    "optim.name": "optimizer",
    "optim.args": "optimizer-args",
    "train.dataloader_num_workers": "workers",
    "evaluation.batch": "evaluation.batch-size",
    "evaluation": "evaluation.",
}
EVALUATION_NAMES = {  # of the commands that measure: field -> name
    "json": "output",
    "batch": "batch-size",
    "retrieval.batch": "batch-size",
}


def in_section(section: str, names: dict[str, str]) -> dict[str, str]:
    """The names for the fields of a section, as ``Names`` takes them."""
    return {f"{section}.{field}": name for field, name in names.items()}


# What options are called: one name for one thing in all commands, and what other programs call it.

# Names of Hugging Face's Trainer and of LLaVA's scripts -> the name now; not shown in --help.
ALSO = {
    "data-path": "data",
    "output-dir": "output",
    "learning-rate": "lr",
    "lr-scheduler-type": "schedule",
    "per-device-train-batch-size": "micro-batch",
    "dataloader-num-workers": "workers",
    "resume-from-checkpoint": "resume",
    "vision-tower": "tower",
    "model-name-or-path": "llm",
}

HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")


def normal(name: str) -> str:
    """``max_steps`` and ``--max-steps`` as ``max-steps``."""
    return name.removeprefix("--").replace("_", "-")


class Names:
    """The names of the fields of one command's settings."""

    def __init__(self, fields: Iterable[str], shown: Mapping[str, str], also: Mapping[str, str]) -> None:
        """``shown``: names that a command chooses; of a field, or of a section (then before the field's last part).

        ``also``: further names that are understood -> the field. Names are without the two dashes.
        """
        fields = tuple(fields)
        leaves = Counter(name.rpartition(".")[2] for name in fields)
        self.shown = {name: self._choose(name, shown, leaves) for name in fields}
        self.fields = {name: field for field, name in self.shown.items()}
        if len(self.fields) != len(fields):
            twice = [name for name, count in Counter(self.shown.values()).items() if count > 1]
            raise AssertionError(f"options with one name: {twice}")
        for name, field in also.items():  # noqa: F402
            self.fields.setdefault(normal(name), field)
        for field in fields:
            self.fields.setdefault(normal(field), field)
            if leaves[leaf := field.rpartition(".")[2]] == 1:
                self.fields.setdefault(normal(leaf), field)
        for name, now in ALSO.items():
            if now in self.fields:
                self.fields.setdefault(name, self.fields[now])

    @staticmethod
    def _choose(field: str, shown: Mapping[str, str], leaves: Mapping[str, int]) -> str:
        section, _, leaf = field.rpartition(".")
        if field in shown:
            return shown[field]
        if section in shown:
            return f"{shown[section]}{normal(leaf)}"
        return normal(leaf if leaves[leaf] == 1 else field)

    def flag(self, field: str) -> str:
        """``--lr`` of ``optim.lr``."""
        return f"--{self.shown[field]}"

    def nearest(self, name: str, more: Iterable[str] = ()) -> str:
        """``; did you mean --lr?``, with the shown name of what comes nearest; "" if nothing does.

        ``more``: names of options that are no fields.
        """
        flags = {**{given: self.flag(field) for given, field in self.fields.items()}, **{o: f"--{o}" for o in more}}
        return nearest(normal(name), flags, flags.__getitem__)


def joined(text: str, more: str) -> str:
    """``text; more``, or ``text more`` after a question."""
    return f"{text} {more}" if text.endswith("?") else f"{text}; {more}"


def unknown(kind: str, name: object, known: Iterable[object], *, also: str = "") -> str:
    """``unknown recipe 'bse'; did you mean 'base'? known: base, quickstart``; ``also`` follows the known names."""
    names = [str(one) for one in known]
    return joined(f"unknown {kind} {name!r}{nearest(str(name), names)}", f"known: {', '.join(names)}{also}")


def nearest(name: str, known: Iterable[str], write: typing.Callable[[str], str] = repr) -> str:
    """``; did you mean 'NAME'?`` with the known name that comes nearest; "" if none is near."""
    near = closest(name, known)
    return f"; did you mean {write(near)}?" if near else ""


def closest(name: str, known: Iterable[str], similar: float = 0.6) -> str:
    """The known name with the fewest slips among those whose similarity by difflib is at least ``similar``; "" if none
    is. difflib's own order takes ``ties`` for ``sutie``, not ``suite``."""
    near = difflib.get_close_matches(name, known := list(known), n=len(known) or 1, cutoff=similar)
    return min(near, key=lambda one: slips(name, one), default="")  # of equal ones, the most similar


def slips(a: str, b: str) -> int:
    """Letters inserted, deleted, replaced or swapped with their neighbor on the way from ``a`` to ``b``.

    >>> slips("sutie", "suite"), slips("sutie", "ties")
    (1, 3)
    """
    before, last = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other)))
            if i > 1 and j > 1 and (letter, a[i - 2]) == (b[j - 2], other):
                row[-1] = min(row[-1], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


# Settings from the words of a command line: each option's words to the type of its field, then the dataclasses.

Settings = TypeVar("Settings")

TRUTH = {"true": True, "false": False}
NUMBERS = {int: "an integer", float: "a number"}


def is_section(hint: Any) -> bool:
    """Whether a field holds further settings."""
    return dataclasses.is_dataclass(hint) and isinstance(hint, type)


def field_types(kind: type, path: str = "") -> dict[str, Any]:
    """Dotted name -> type of every leaf of nested dataclasses."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if is_section(hint):
            leaves |= field_types(hint, f"{path}{name}.")
        elif typing.get_origin(hint) is not typing.ClassVar:
            leaves[path + name] = hint
    return leaves


def takes_several(hint: Any) -> bool:
    """Whether an option takes all words up to the next option."""
    return typing.get_origin(hint) is tuple


def convert(hint: Any, words: Sequence[str], flag: str) -> Any:
    """The words after an option as its field's type. Raises ValueError that names the option."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return tuple(convert(arguments[0], [word], flag) for word in words)
        if len(words) != len(arguments):
            raise ValueError(f"{flag} takes {len(arguments)} values; got {' '.join(words) or 'none'}")
        return tuple(convert(each, [word], flag) for each, word in zip(arguments, words, strict=True))
    if len(words) != 1:
        raise ValueError(f"{flag} needs a value")
    (word,) = words
    if origin in (typing.Union, types.UnionType):
        return None if word.lower() == "none" else convert(arguments[0], words, flag)
    if origin is typing.Literal:
        if word not in arguments:
            raise ValueError(f"{flag} {word!r} is not one of {', '.join(arguments)}{nearest(word, arguments)}")
        return word
    if hint is bool:
        if word.lower() not in TRUTH:
            raise ValueError(f"{flag} {word!r} is neither True nor False")
        return TRUTH[word.lower()]
    try:
        return hint(word)
    except ValueError as error:
        raise ValueError(f"{flag} {word!r} is not {NUMBERS.get(hint, hint.__name__)}") from error


def build(kind: type[Settings], values: dict[str, Any], default: Settings | None = None, path: str = "") -> Settings:
    """``default``, or a new one, with the ``values`` of dotted names. Raises ValueError of the dataclasses' checks.

    Raises KeyError with the dotted name of a field that has neither a value nor a default.
    """
    hints, given = typing.get_type_hints(kind), {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = path + item.name
        if is_section(hints[item.name]):
            if default is None or any(field.startswith(f"{name}.") for field in values):
                inner = getattr(default, item.name) if default is not None else _default(item)
                given[item.name] = build(hints[item.name], values, inner, f"{name}.")
        elif name in values:
            given[item.name] = values[name]
        elif default is None and not _has_default(item):
            raise KeyError(name)
    return dataclasses.replace(default, **given) if default is not None else kind(**given)  # type: ignore[type-var]


def _has_default(item: dataclasses.Field) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def _default(item: dataclasses.Field) -> Any:
    """The field's default; None without one."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else None


# What a command declares: its settings, what its options are called, and what --help says.


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


# The text of --help: an example, what the command does, its options of every day; --help-all has the others.

WIDTH = 110
COLUMN = 30  # where the texts begin
METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}


def help_text(command: Declared[Any], *, everything: bool = False) -> str:
    """What ``--help`` prints, or ``--help-all``."""
    default = command.default() if command.default else None
    parts = [f"example:\n  {command.example}", command.usage, textwrap.fill(command.about, WIDTH)]
    leaves = {leaf.name: leaf for leaf in settings(command.settings, default) if leaf.name in command.types}
    chosen = [*command.extras, *leaves] if everything or not command.everyday else command.everyday
    listed: dict[str, list[str]] = {}
    for name in dict.fromkeys([*command.arguments, *chosen]):
        if name in command.extras:
            extra = command.extras[name]
            row, section = _row(f"--{name} {extra.metavar}", extra.help), ""
        else:
            leaf = leaves[name]
            argument = name in command.arguments
            row = _row(
                command.placeholder(name) if argument else _spelled(command, leaf), (leaf.help + leaf.value).strip()
            )
            section = "" if argument or not everything else leaf.section
        listed.setdefault(section, []).append(row)
    for section, rows in listed.items():
        parts.append("\n".join([f"{section or 'options'}:", *rows]))
    if command.everyday and not everything:
        more = len(command.types) + len(command.extras) - len(set(command.everyday) | set(command.arguments))
        parts.append(f"`llm2clip {command.name} --help-all` lists {more} more options.")
    return "\n\n".join(parts)


def _row(spelled: str, text: str) -> str:
    first = f"  {spelled:<{COLUMN - 3}} "
    lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    if len(first) > COLUMN:
        lines = ["", *lines]
    return "\n".join([(first + lines[0]).rstrip(), *(" " * COLUMN + line for line in lines[1:])])


def _spelled(command: Declared[Any], leaf: Leaf) -> str:
    flag = command.names.flag(leaf.name)
    if leaf.type is bool:
        return f"{flag}, {_negative(flag)}" if leaf.default is True else flag
    return f"{flag} {_metavar(leaf.type)}"


def _negative(flag: str) -> str:
    section, dot, leaf = flag.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{leaf}"


def _metavar(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if takes_several(hint):
        each = _metavar(arguments[0])
        return f"{each} ..." if arguments[-1] is Ellipsis else " ".join(each for _ in arguments)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(filter(None, arguments))
    return METAVARS.get(arguments[0] if arguments else hint, "VALUE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A field that is an option."""

    name: str  # dotted
    type: Any
    help: str
    default: Any  # dataclasses.MISSING if there is none
    section: str  # first line of the docstring of the dataclass that holds it

    @property
    def value(self) -> str:
        """The default as --help shows it; "" for one that says nothing."""
        shown = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        empty = shown in ("", None, dataclasses.MISSING) or self.type is bool
        return "" if empty else f" (default: {shown:g})" if isinstance(shown, float) else f" (default: {shown})"


def settings(kind: type, default: Any = None, path: str = "") -> Iterator[Leaf]:
    """Every leaf of nested dataclasses, with its value in ``default`` or the field's own default."""
    hints, texts = typing.get_type_hints(kind), field_comments(kind)
    section = inspect.cleandoc(kind.__doc__ or "").partition("\n")[0].rstrip(".")
    for item in dataclasses.fields(kind):
        if default is not None:
            value = getattr(default, item.name)
        elif item.default is not dataclasses.MISSING or item.default_factory is dataclasses.MISSING:
            value = item.default
        else:
            value = item.default_factory()
        hint = hints[item.name]
        if is_section(hint):
            yield from settings(hint, None if value is dataclasses.MISSING else value, f"{path}{item.name}.")
        else:
            yield Leaf(
                name=path + item.name,
                type=hint,
                help=texts.get(item.name, ""),
                default=value,
                section=section,
            )


def field_comments(kind: type) -> dict[str, str]:
    """The comment of every field of a dataclass, those that it inherits too: above the field, or after it."""
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _comments(base)
    return comments


def _comments(kind: type) -> dict[str, str]:
    lines = linecache.getlines(sys.modules[kind.__module__].__file__ or "")
    heads = (f"class {kind.__name__}(", f"class {kind.__name__}:")
    start = next((i for i, line in enumerate(lines) if line.startswith(heads)), None)
    if start is None:
        return {}
    end = next((i for i in range(start + 1, len(lines)) if lines[i].strip() and not lines[i][0].isspace()), len(lines))
    own = set(vars(kind).get("__annotations__", {}))
    comments: dict[str, str] = {}
    above: list[str] = []
    current, at_start = "", True
    for token in tokenize.generate_tokens(iter(lines[start:end]).__next__):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").rstrip()
            if token.line.lstrip().startswith("#") and at_start:
                above.append(text)
            elif current:
                comments[current] = f"{comments.get(current, '')} {text}".strip()
        elif token.type == tokenize.NAME and at_start and token.start[1] == 4:
            current = token.string if token.string in own else ""
            if current and above:
                comments[current] = " ".join(above)
            above = []
            if token.string in ("def", "class"):
                break
        if token.type in (tokenize.NEWLINE, tokenize.INDENT):
            at_start = True
        elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.DEDENT):
            at_start = False
    return comments


# A command whose options are the fields of a dataclass: its words become settings, ``--help`` becomes text.

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


# ``argparse`` with an example first, earlier names of options, and the nearest name for an unknown one.


class Parser(argparse.ArgumentParser):
    """A command's parser. Underscores are understood as dashes, other programs' names of options as ours."""

    def __init__(
        self,
        name: str,
        example: str,
        about: str,
        also: Mapping[str, str] | None = None,
        rare: Sequence[str] = (),
    ) -> None:
        """``name``: as typed after llm2clip; ``also``: further names that are understood -> the option's; ``rare``:
        names of options that --help-all lists and --help does not."""
        super().__init__(
            prog=f"llm2clip {name}",
            description=about,
            add_help=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
        )
        self.example = example
        self.also = {**ALSO, **(also or {})}
        self.rare = frozenset(f"--{name}" for name in rare)

    def format_usage(self) -> str:
        """One line: the arguments, and the options that must be given."""
        words = [self._in_usage(action) for action in self._actions if not action.option_strings]
        for action in self._actions:
            if action.option_strings and action.required:
                words += [action.option_strings[0], str(action.metavar or action.dest.upper())]
        return " ".join(["usage:", self.prog, *words, "[options]"]) + "\n"

    @staticmethod
    def _in_usage(action: argparse.Action) -> str:
        name = str(action.metavar or action.dest)
        return {"+": f"{name} [{name} ...]", "*": f"[{name} ...]"}.get(str(action.nargs), name)

    def format_help(self, *, everything: bool = False) -> str:
        """Example, usage, what the command does, its arguments and options; without the rare ones."""
        formatter = self._get_formatter()
        for group in self._action_groups:
            shown = [action for action in group._group_actions if everything or not self._is_rare(action)]
            formatter.start_section("arguments" if group is self._positionals else group.title)
            formatter.add_arguments(shown)
            formatter.end_section()
        parts = [f"example:\n  {self.example}\n", self.format_usage(), f"{self.description}\n", formatter.format_help()]
        if self.rare and not everything:
            parts.append(f"`{self.prog} --help-all` lists {len(self.rare)} more options.\n")
        return "\n".join(parts)

    def _is_rare(self, action: argparse.Action) -> bool:
        return not self.rare.isdisjoint(action.option_strings)

    def read(self, argv: Sequence[str]) -> Any:
        """``parse_args`` of the words before ``--``, after which another program's options may stand."""
        words = list(argv)
        return self.parse_args(words[: words.index("--")] if "--" in words else words)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse, with arguments anywhere among the options; an unknown option is answered with the nearest."""
        words = [self._translated(word) for word in (sys.argv[1:] if args is None else args)]
        if any(word in (*HELP, *HELP_ALL) for word in words):
            sys.stdout.write(self.format_help(everything=any(word in HELP_ALL for word in words)))
            self.exit()
        options = words[: words.index("--")] if "--" in words else words
        self._refuse(word for word in options if word.startswith("--"))  # before what is missing is missed
        parsed, rest = self.parse_known_intermixed_args(words, namespace)
        if rest:
            self._refuse(word for word in rest if word.startswith("-"))
            self.error(f"unknown argument {rest[0]}")
        return parsed

    def _refuse(self, words: Iterable[str]) -> None:
        """Exit with the nearest name for the first word that is no option, nor the beginning of one."""
        for name in (word.partition("=")[0] for word in words):
            if not any(known.startswith(name) for known in self._option_string_actions):
                shown = [action.option_strings[0] for action in self._actions if action.option_strings]
                self.error(f"unknown option {name}{nearest(name, shown, str)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in (known := list(action.choices)):
            flag = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
            self.error(f"{flag} {value!r} is not one of {', '.join(known)}{nearest(value, known)}")

    def error(self, message: str) -> NoReturn:
        """One line, and exit status 2."""
        self.exit(2, f"error: {joined(message, f'`{self.prog} --help-all` lists the options')}\n")

    def _translated(self, word: str) -> str:
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if not name.startswith("--") or name in known:
            return word
        for now in (f"--{normal(name)}", f"--{self.also.get(normal(name), '')}"):
            if now in known:
                return f"{now}{equals}{value}"
        return word


def add_data(parser: Parser, text: str, **options: Any) -> None:
    """DATA as an argument, also understood as ``--data DATA``."""
    parser.add_argument("data_argument", metavar="DATA", nargs="?", help=text, **options)
    parser.add_argument("--data", dest="data_option", help=argparse.SUPPRESS, **options)


def data_of(parser: Parser, options: argparse.Namespace) -> Any:
    """DATA, however it is given; exits with status 2 if it isn't, or twice."""
    given = [value for value in (options.data_argument, options.data_option) if value is not None]
    if len(given) != 1:
        parser.error("DATA is missing" if not given else f"DATA is given twice: {given[0]} and {given[1]}")
    return given[0]


# The commands that messages show: complete, and quoted so that a shell reads them as printed.


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
        option = READ_NAMES.get(name, f"{prefix}{name}".replace("_", "-"))
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--{prefix}no-{name}".replace("_", "-"))
        elif isinstance(value, tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


# What is at a path, by file names and config.json alone: a wrong one is named before any library is loaded.

MODELS = {
    "adapter": "a PEFT adapter",
    "clip": "an image-text model",
    "llava": "a LLaVA checkpoint",
    "llm": "a language model",
    "tower": "a tower directory",
    "vision": "a vision model",
}
KINDS = {
    **MODELS,
    "cache": "an embedding cache",
    "data": "a data set",
    "run": "a training run",
    "scores": "a score file",
    "weights": "a file of weights",
}
WANTED = {  # of a role: what is accepted, and how errors say it
    "data": ({"data"}, "captioned images: a folder of .tar shards, a .tar, .jsonl or LLaVA's .json"),
    "pictures": ({"data"}, "a folder of pictures, or a table with a column of their paths: .csv, .tsv, .parquet"),
    "llm": ({"llm", "clip"}, "an LLM: a Hugging Face model folder, or a Hub id (owner/name)"),
    "tokenizer": ({"llm", "clip", "adapter", "llava"}, "a folder with a tokenizer, or a Hub id (owner/name)"),
    "adapter": ({"adapter"}, "the folder of a PEFT adapter, or a Hub id"),
    "cache": ({"cache"}, "the folder of an embedding cache"),
    "start": ({"tower", "vision", "clip", "llava"}, "a tower directory, a vision model or a Hub id (owner/name)"),
    "tower": ({"tower", "vision", "clip"}, "a tower directory or a Hub id (owner/name)"),
    "run": ({"run", "tower"}, "a training run or a tower directory"),
    "checkpoint": ({"tower", "vision", "clip", "weights", "llava"}, "a vision or image-text checkpoint"),
    "llava": ({"llava", "adapter"}, "a LLaVA checkpoint"),
}
# fields of a command's settings, or argparse's names -> role; "COMMAND FIELD" goes before "FIELD"
ROLES = {
    **dict.fromkeys(("path", "source.path", "data.path", "data.validation", "data", "train", "test"), "data"),
    **dict.fromkeys(("pairs.data", "measure.captions", "evaluation.captions", "captions", "post_data"), "data"),
    **dict.fromkeys(("encoder.llm", "teacher.llm", "llm"), "llm"),
    **dict.fromkeys(("encoder.adapter", "teacher.adapter", "adapter"), "adapter"),
    **dict.fromkeys(("cache", "data.cache", "data.clip_cache", "data.validation_cache"), "cache"),
    **dict.fromkeys(("tower", "towers"), "tower"),
    **dict.fromkeys(("model_path", "checkpoint", "checkpoints"), "llava"),
    "tokenizer": "tokenizer",
    "tower.path": "start",
    "run tower": "start",
    "run questions": "data",
    "run llava_llm": "llm",
    "data make path": "pictures",
    "export source": "run",
    "export checkpoint": "",
    "import source": "checkpoint",
    "llava export tower": "",
    "llava bundle tower": "",
}
EXPORTS = ("export", "import", "export-llm", "llava export")  # --output is a folder with a model
REPORTS = {"output", "json", "html", "markdown"}  # options with a file to write, in some commands
NO_SCORES = ("compare", "search")  # commands whose reports are no score files
MUST_EXIST = {"data": "data", "pictures": "pictures", "llm": "LLM", "adapter": "adapter"}  # others' readers say more
LOOKED_AT = 1000  # entries of a folder
TEXTS = (".txt", ".csv", ".tsv")


def checked(declared: Any, argv: Sequence[str]) -> Any:
    """What a Command or a Parser reads from the words; raises as ``check_paths``."""
    read = declared.read(argv)
    if isinstance(declared, Parser):
        actions = declared._actions
        names = {one.dest: one.option_strings[0] if one.option_strings else str(one.metavar) for one in actions}
        check_paths(declared.prog.removeprefix("llm2clip "), vars(read), names)
    else:
        check_paths(declared.name, read.values, {field: declared.placeholder(field) for field in read.values})
    return read


def check_paths(command: str, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise ValueError or FileNotFoundError for an option with a path to something else than it takes.

    values: of the options that were given, by field; names: the options as they are written.
    """
    roles = {field: ROLES.get(f"{command} {field}", ROLES.get(field, "")) for field in values}
    for field, role in roles.items():  # noqa: F402
        for path in _texts(values[field]):
            if role and path:
                others = {names[one]: roles[one] for one in values if one != field and roles[one]}
                check_path(role, path, names[field], others)
    for field in REPORTS.intersection(values):
        for path in _texts(values[field]):
            kind = kind_of(path) if os.path.isfile(path) else ""
            if kind in ("data", "weights") or (kind == "scores" and command in NO_SCORES):
                raise FileExistsError(f"{names[field]} {path} is {KINDS[kind]} and would be lost; choose another path")
    if command in EXPORTS and (output := str(values.get("output") or "")):
        inputs = [text for field, role in roles.items() if role for text in _texts(values[field])]
        _check_output(output, inputs, overwrite=bool(values.get("overwrite")))


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [str(item) for item in items if isinstance(item, (str, Path))]


def check_path(role: str, path: str, option: str, others: Mapping[str, str] = MappingProxyType({})) -> None:
    """``check_paths`` of one option; others: written names of the command's other options -> role."""
    accepted, wanted = WANTED[role]
    kind = kind_of(path)
    if kind == "" and role in MUST_EXIST and _is_missing(path, role):
        folder, name = os.path.split(path.rstrip("/"))
        near = nearest(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
        raise FileNotFoundError(joined(f"no {MUST_EXIST[role]} at {path}{near}", f"expected {wanted}"))
    if not kind or kind in accepted:
        if role == "llm" and kind == "llm":
            check_llm(path)
        return
    inside = {"adapter": "adapter", "llm": "adapter", "tower": "tower", "start": "tower"}.get(role, "")
    hint = f"expected {wanted}"
    if kind == "run" and inside and os.path.isdir(os.path.join(path, inside)):
        hint = f"its {inside} is {os.path.join(path, inside)}{' (--adapter)' * (role == 'llm')}"
    elif swapped := next((name for name, other in others.items() if kind in WANTED[other][0]), ""):
        hint = f"did you mean it for {swapped}?"
    elif role == "run" and kind in ("vision", "clip"):
        hint = "`llm2clip import` makes a tower directory of it"
    raise ValueError(f"{option} {path} is {KINDS[kind]}{_model_type(path)}; {hint}")


def _is_missing(path: str, role: str) -> bool:
    """Whether a local path is not there; a Hub id, a URL, a wildcard or braces is none."""
    if os.path.exists(os.path.expanduser(path)) or "://" in path:
        return False
    if role in ("data", "pictures"):
        return not (glob.has_magic(path) or "{" in path)
    return can_only_be_a_path(path)


def kind_of(path: str) -> str:
    """The key of KINDS for what is at ``path``; "" for anything that is not recognized, and for nothing."""
    place = Path(path).expanduser()
    try:
        if place.is_file():
            return _kind_of_file(place)
        if not place.is_dir():
            return ""
        return _kind_of_folder(place)
    except OSError:
        return ""


def _kind_of_file(place: Path) -> str:
    if place.suffix in (".safetensors", ".bin", ".pt", ".pth", ".npz"):
        return "weights"
    if place.suffix in (".tar", ".jsonl", *TEXTS):
        return "data"
    if place.suffix != ".json":
        return ""
    with place.open("rb") as file:
        start = file.read(200)
    return "scores" if b'"llm2clip-scores"' in start else "data" if start.lstrip().startswith(b"[") else ""


def _kind_of_folder(place: Path) -> str:
    with os.scandir(place) as entries:
        endings = {os.path.splitext(entry.name)[1] for entry in itertools.islice(entries, LOOKED_AT)}
    if ".tar" in endings:
        return "data"
    for file, kind in (("run.json", "run"), ("embed.json", "cache"), ("llm2clip.json", "tower")):
        if (place / file).is_file():
            return kind
    config = read_config(place)
    if str(config.get("model_type", "")).startswith("llava") or "mm_vision_tower" in config:
        return "llava"
    if (place / "adapter_config.json").is_file():
        return "adapter"
    if (place / "manifest.json").is_file() and b'"llm2clip-cache"' in (place / "manifest.json").read_bytes()[:200]:
        return "cache"
    if (place / "open_clip_config.json").is_file():
        return "clip"
    if any(place.glob("*.onnx")):
        return "tower"
    if isinstance(config.get("vision_config"), dict):
        return "" if any("image_token" in key for key in config) else "clip"  # a multimodal LLM is either
    if "vocab_size" in config or "text_config" in config:
        return "llm"
    if config and ("image_size" in config or "patch_size" in config or "pretrained_cfg" in config):
        return "vision"
    return "data" if ".jsonl" in endings else ""


def read_config(place: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a model's folder; {} if there is none that can be read."""
    try:
        config = json.loads((place / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _model_type(path: str) -> str:
    kind = read_config(Path(path).expanduser()).get("model_type")
    return f" ({kind})" if isinstance(kind, str) and kind else ""


def check_llm(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a language model's folder that is quantized already or has no tokenizer."""
    place = Path(path).expanduser()
    quantized = read_config(place).get("quantization_config")
    if isinstance(quantized, dict):
        method = str(quantized.get("quant_method", "quantized")).upper().replace("BITSANDBYTES", "bitsandbytes")
        raise ValueError(
            f"{path} is saved quantized ({method}), and LoRA, merging and its fingerprint need the original weights; "
            "take the model that it was made from, with --load-in-4bit if memory is short"
        )
    if not any(place.glob("tokenizer*")) and not any(place.glob("vocab*")) and not any(place.glob("*.model")):
        raise ValueError(f"{path} has no tokenizer (no tokenizer.json or tokenizer.model); copy it from the original")


def _check_output(output: str, inputs: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder that has files, or, with --overwrite, that has the input or is not an exported model."""
    place = Path(output).expanduser()
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists and is not empty; choose another path or pass --overwrite")
    for path in inputs:
        if os.path.exists(path) and Path(path).resolve().is_relative_to(place.resolve()):
            raise ValueError(f"--output {output} has the input {path}, which --overwrite would delete; choose another")
    if (kind := kind_of(output)) not in MODELS:
        raise ValueError(
            f"--output {output} is {KINDS.get(kind, 'a folder that is no model')}, and --overwrite deletes all that is "
            "in it; choose another path"
        )
