"""Commands whose options are the fields of (nested) dataclasses: one declaration gives names,
parser, checks, --help.

A setting is a field, ``optim.lr``. Its option is the last part, ``--lr``, where only one field of
the command ends in it, else the dotted name, or the name that NAMES or the command gives it. The
dotted name, the last part and the names of other programs are understood too, with dashes or
underscores. What an option means is the comment next to its field. docs/options.md has the table.
Below: unknown names, commands as text, and mistyped paths.
"""

import dataclasses
import difflib
import functools
import glob
import itertools
import linecache
import math
import os
import re
import shlex
import sys
import textwrap
import types
import typing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from llm2clip_plugin.bounds import INT64, check_number
from llm2clip_plugin.folders import KINDS, refuse_foreign
from llm2clip_plugin.hub import can_only_be_a_path
from llm2clip_plugin.json_files import default_of, from_plain

Settings = TypeVar("Settings")

# One name for one thing in all commands: a field, or the last part of one -> its option.
NAMES = {
    "path": "data",
    "images": "image-folder",
    "batch": "batch-size",
    "output_dir": "output",
    "dataloader_num_workers": "workers",
    "optim.name": "optimizer",
    "optim.args": "optimizer-args",
}
# Names of Hugging Face's Trainer and of LLaVA's scripts -> the name here; understood, but not shown
# in --help.
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
# the Trainer's flags, and the field that has their meaning
HALF = ("bf16", "fp16")
PRECISION = "train.precision"
HELP = ("-h", "--help")
HELP_ALL = ("--help-all", "--help_all")
OPTION = re.compile(r"--[A-Za-z]")
NUMBER = re.compile(r"-?\.?\d")
TRUTH = {"true": True, "false": False}
AUTO = bool | Literal["auto"]  # a flag that may be left to the program
# of --help; where its texts begin
WIDTH = 110
COLUMN = 30
METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Leaf(NamedTuple):
    """A field that is an option."""

    type: Any
    default: Any  # dataclasses.MISSING if it must be given
    help: str
    section: str  # first line of the docstring of the dataclass that holds it


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Settings]):
    """A command and the settings that it reads. Lists of names are texts, with spaces between the
    names."""

    name: str  # as typed after llm2clip
    example: str  # a complete command line
    about: str  # what the command does
    settings: type[Settings]
    # fields that stand without an option, in this order; the last may take several
    arguments: str = ""
    everyday: str = ""  # options that --help lists, --help-all has the others; "": all
    # field, or section -> name, or what precedes its names
    shown: Mapping[str, str] = field(default_factory=dict)
    # further names that are understood -> field
    also: Mapping[str, str] = field(default_factory=dict)
    # options that are no settings: name -> help
    extras: Mapping[str, str] = field(default_factory=dict)
    hidden: str = ""  # fields without an option
    rest: str = ""  # field that takes the words after --
    # field, a number -> the value of its option without one
    alone: Mapping[str, str] = field(default_factory=dict)
    # makes the settings that options override from the extra options; None: the fields' own
    # defaults
    default: Callable[[Mapping[str, str]], Settings] | None = None
    # option -> the setting that would take its place, and is set to 0 when the option is given
    # without it
    replaces: Mapping[str, str] = field(default_factory=dict)
    # option or section -> the setting without which it has no effect; "not NAME": with which it has
    # none. After ": " may stand how an error says it.
    needs: Mapping[str, str] = field(default_factory=dict)

    def parse(self, argv: Sequence[str]) -> Settings:
        """The settings of a command line. Prints --help and exits with status 0 if it is among the
        words. Raises ValueError for an unknown or missing option, an unusable value, one without
        effect, and what settings refuse."""
        values, extras = self.read(argv)
        default = self.default(extras) if self.default else None
        replaced = {other: 0 for option, other in self.replaces.items() if option in values}
        tree: dict[str, Any] = {}
        for name, value in {**replaced, **values}.items():
            *sections, last = name.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        config = from_plain(self.settings, tree, where=f"llm2clip {self.name}", default=default)
        self._refuse_without_effect(config, values)
        for name in self.options.keys() & values.keys():
            check_number(self.written(name), name, values[name])
        return config

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The values that a command line gives, by dotted name of the field, and those of the extra
        options. Prints --help and exits with status 0 if it is among the words."""
        words = list(argv)
        rest: list[str] = []
        if self.rest and "--" in words:
            end = words.index("--")
            rest = words[end + 1 :]
            words = words[:end]
        if any(word in (*HELP, *HELP_ALL) for word in words):
            print(self.help_text(everything=any(word in HELP_ALL for word in words)))
            raise SystemExit(0)
        values: dict[str, Any] = {}
        bare: list[str] = []
        waiting = deque(words)
        while waiting:
            word = waiting.popleft()
            if not OPTION.match(word):
                bare.append(word)
            elif not word.startswith(("--local_rank=", "--local-rank=")):
                # the launcher's, which sets LOCAL_RANK too
                name, hint, texts = self._option(word, waiting)
                try:
                    values[name] = _value(hint, texts)
                except ValueError as error:
                    raise ValueError(f"--{self.options.get(name, name)}: {error}") from None
        extras = {name: values.pop(name) for name in self.extras if name in values}
        half = [name for name in HALF if values.pop(name, False)]
        if len(half) > 1:
            raise ValueError("--bf16 and --fp16 exclude each other; give one")
        if half:
            values[PRECISION] = half[0]
        if rest:
            values[self.rest] = tuple(rest)
        for name in self.arguments.split():
            if not bare or name in values:
                continue
            if typing.get_origin(self.leaves[name].type) is tuple:
                values[name] = tuple(bare)
                bare = []
            else:
                values[name] = bare.pop(0)
        if bare:
            raise ValueError(f"unexpected argument {bare[0]!r}; {self.usage}")
        required = (name for name, leaf in self.leaves.items() if leaf.default is MISSING)
        if missing := [self.written(name) for name in required if name not in values]:
            raise ValueError(f"missing {' and '.join(missing)}; {self.usage}")
        return values, extras

    def written(self, name: str) -> str:
        """How usage and errors write a field: DATA, or --llm."""
        option = self.options[name]
        return option.upper() if name in self.arguments.split() else f"--{option}"

    @property
    def usage(self) -> str:
        """One line: ``usage: llm2clip make DATA [DATA ...] --output TEXT [options]``."""
        names = self.arguments.split()
        words = [self.written(name) for name in names]
        if names and typing.get_origin(self.leaves[names[-1]].type) is tuple:
            words.append(f"[{words[-1]} ...]")
        required = [
            name
            for name, leaf in self.leaves.items()
            if leaf.default is MISSING and name not in names
        ]
        words += [self._spelled(name) for name in required]
        return " ".join(["usage: llm2clip", self.name, *words, "[options]"])

    @functools.cached_property
    def leaves(self) -> dict[str, Leaf]:
        """Every field that is an option, or stands for one of ``arguments``, by dotted name."""
        default = self.default({}) if self.default else MISSING
        hidden = (*self.hidden.split(), self.rest)
        return {
            name: leaf for name, leaf in leaves_of(self.settings, default) if name not in hidden
        }

    @functools.cached_property
    def options(self) -> dict[str, str]:
        """Field -> the name of its option."""
        usual = {
            name: NAMES.get(name) or NAMES.get(last_part(name)) or last_part(name)
            for name in self.leaves
        }
        named = [  # by the command itself
            name for name in usual if name in self.shown or section_of(name) in self.shown
        ]
        count = Counter(option for name, option in usual.items() if name not in named)
        names = {}
        for name, option in usual.items():
            section = section_of(name)
            if name in named:
                option = self.shown.get(name) or self.shown[section] + option
            elif count[option] > 1:
                option = f"{section}.{option}" if section else option
            names[name] = option.replace("_", "-")
        return names

    @functools.cached_property
    def understood(self) -> dict[str, str]:
        """Name of an option, those of other programs too -> its field."""
        count = Counter(map(last_part, self.leaves))
        fields = {option: name for name, option in self.options.items()}
        assert len(fields) == len(self.options), f"options with one name: {self.options}"
        unique = {last_part(name): name for name in self.leaves if count[last_part(name)] == 1}
        for names in (self.also, {name: name for name in self.leaves}, unique):
            for name, dotted_name in names.items():
                fields.setdefault(name.replace("_", "-"), dotted_name)
        elsewhere = {name: fields[option] for name, option in ALSO.items() if option in fields}
        return {**elsewhere, **fields}

    def _option(self, word: str, waiting: deque[str]) -> tuple[str, Any, list[str]]:
        """The field, or extra option, of a word, its type, its values in the words after it;
        ValueError if unknown."""
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        flags = [
            option
            for option, dotted_name in self.understood.items()
            if self.leaves[dotted_name].type in (bool, AUTO)
        ]
        section, dot, last = name.rpartition(".")
        positive = f"{section}{dot}{last.removeprefix('no-')}"
        if name in self.understood:
            name = self.understood[name]
            hint = self.leaves[name].type
        elif positive in flags:
            return self.understood[positive], bool, ["false"]
        elif name in self.extras or (name in HALF and PRECISION in self.leaves):
            hint = bool if name in HALF else str
        else:
            known = [*self.understood, *self.extras, *map(negative, flags)]
            nearest = difflib.get_close_matches(name, known, n=1)
            advice = f" (did you mean --{nearest[0]}?)" if nearest else ""
            raise ValueError(
                f"unknown option {option}{advice}; `llm2clip {self.name} --help-all` lists all"
            )
        if equals:
            return name, hint, [value]
        next_word = waiting[0] if waiting else ""
        if hint in (bool, AUTO):
            choices = TRUTH if hint is bool else (*TRUTH, "auto")
            if next_word.lower() not in choices:
                return name, hint, ["true"]
        if name in self.alone and not NUMBER.match(next_word):
            return name, hint, [self.alone[name]]
        most = 1
        if typing.get_origin(hint) is tuple:
            kinds = typing.get_args(hint)
            most = len(waiting) if kinds[-1] is Ellipsis else len(kinds)
        texts: list[str] = []
        while waiting and not OPTION.match(waiting[0]) and len(texts) < most:
            texts.append(waiting.popleft())
        return name, hint, texts

    def _refuse_without_effect(self, config: Settings, given: Mapping[str, Any]) -> None:
        """Raise ValueError for a given option that another setting makes void."""
        for option, need in self.needs.items():
            for name, given_value in given.items():
                if not given_value or not f"{name}.".startswith(f"{option}."):
                    continue
                setting, _, why = need.removeprefix("not ").partition(": ")
                value = functools.reduce(getattr, setting.split("."), config)
                # -1 steps are none
                is_set = value > 0 if isinstance(value, (int, float)) else bool(value)
                if is_set is need.startswith("not "):
                    why = why or f"{'with' if is_set else 'without'} {self.written(setting)}"
                    raise ValueError(f"{self.written(name)} has no effect {why}; remove it")

    def help_text(self, *, everything: bool = False) -> str:
        """What ``--help`` prints, or ``--help-all``: an example, what the command does, and its
        options."""
        parts = [f"example:\n  {self.example}", self.usage, textwrap.fill(self.about, WIDTH)]
        arguments = self.arguments.split()
        every = [*self.extras, *self.leaves]
        everyday = [self.understood.get(option, option) for option in self.everyday.split()]
        chosen = every if everything or not everyday else everyday
        listed: dict[str, list[str]] = {}
        for name in dict.fromkeys([*arguments, *chosen]):
            if name in self.extras:
                row = _row(f"--{name} {name.upper()}", self.extras[name])
                section = ""
            else:
                leaf = self.leaves[name]
                text = f"{leaf.help}{_shown(leaf.default)}".strip()
                row = _row(self.written(name) if name in arguments else self._spelled(name), text)
                section = leaf.section if everything and name not in arguments else ""
            listed.setdefault(section, []).append(row)
        parts += [
            "\n".join([f"{section or 'options'}:", *rows]) for section, rows in listed.items()
        ]
        if more := len({*every} - {*arguments, *chosen}):
            parts.append(f"`llm2clip {self.name} --help-all` lists {more} more options.")
        return "\n\n".join(parts)

    def _spelled(self, name: str) -> str:
        flag = f"--{self.options[name]}"
        leaf = self.leaves[name]
        if leaf.type == AUTO:
            return f"{flag} true|false|auto"
        if leaf.type is not bool:
            return f"{flag} {_metavar(leaf.type)}"
        return f"{flag}, --{negative(self.options[name])}" if leaf.default is True else flag


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The settings of a command without any."""


def last_part(name: str) -> str:
    """``lr`` of ``optim.lr``."""
    return name.rpartition(".")[2]


def section_of(name: str) -> str:
    """``optim`` of ``optim.lr``; "" of ``seed``."""
    return name.rpartition(".")[0]


def negative(option: str) -> str:
    """``loss.no-mask`` of ``loss.mask``."""
    section, dot, last = option.rpartition(".")
    return f"{section}{dot}no-{last}"


def _value(hint: Any, texts: Sequence[str]) -> Any:
    """The words of an option as a value of its type. Raises ValueError."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        if texts in ([""], ["none"]):
            return ()
        return tuple(_value(arguments[0], [text]) for text in texts)
    count = len(arguments) if origin is tuple else 1
    if len(texts) != count:
        raise ValueError(f"expected {count} {'values' if count > 1 else 'value'}")
    if origin is tuple:
        return tuple(_value(arguments[0], [text]) for text in texts)
    text = texts[0]
    if hint == AUTO:
        return "auto" if text.lower() == "auto" else _value(bool, texts)
    if origin in (typing.Union, types.UnionType):  # an optional value
        return None if text.lower() == "none" else _value(arguments[0], texts)
    if origin is typing.Literal and text not in arguments:
        raise ValueError(f"{text!r}, expected one of {', '.join(map(repr, arguments))}")
    if hint is bool and text.lower() not in TRUTH:
        raise ValueError(f"{text!r} is neither True nor False")
    if origin is typing.Literal or hint is bool:
        return TRUTH[text.lower()] if hint is bool else text
    try:
        value = hint(text)
    except ValueError:
        raise ValueError(f"{text!r} is no {hint.__name__}") from None
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite; expected a number")
    if hint is int and abs(value) > INT64:
        raise ValueError(f"{text} does not fit into 64 bits; expected a smaller number")
    return value


def _metavar(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        metavar = _metavar(arguments[0])
        if arguments[-1] is Ellipsis:
            return f"{metavar} ..."
        return " ".join([metavar] * len(arguments))
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(filter(None, arguments))
    return METAVARS.get(arguments[0] if arguments else hint, "VALUE")


def _row(spelled: str, text: str) -> str:
    first = f"  {spelled:<{COLUMN - 3}} "
    lines = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    if len(first) > COLUMN:
        lines = ["", *lines]
    return "\n".join([(first + lines[0]).rstrip(), *(" " * COLUMN + line for line in lines[1:])])


def _shown(default: Any) -> str:
    """A default as --help shows it; "" for one that says nothing."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default in ("", None, MISSING) or isinstance(default, bool):
        return ""
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"


def leaves_of(kind: type, default: Any = MISSING, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """(dotted name, leaf) of nested dataclasses; the values of ``default``, or the fields' own."""
    hints = typing.get_type_hints(kind)
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _comments(base)
    section = _first_sentence(kind.__doc__ or "")
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        value = default_of(item) if default is MISSING else getattr(default, item.name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves_of(hint, value, f"{path}{item.name}.")
        else:
            yield path + item.name, Leaf(hint, value, comments.get(item.name, ""), section)


def _first_sentence(docstring: str) -> str:
    """A docstring up to its first line that ends in a period or colon, on one line."""
    lines: list[str] = []
    for line in docstring.strip().splitlines():
        if not line.strip():
            break
        lines.append(line.strip())
        if line.rstrip().endswith((".", ":")):
            break
    return " ".join(lines).rstrip(".:")


def _comments(kind: type) -> dict[str, str]:
    """The comment of every field that a dataclass declares: above the field, or next to it."""
    lines = linecache.getlines(sys.modules[kind.__module__].__file__ or "")
    heads = (f"class {kind.__name__}(", f"class {kind.__name__}:")
    start = next(
        (number for number, line in enumerate(lines, 1) if line.startswith(heads)), len(lines)
    )
    texts: dict[str, str] = {}
    name = ""
    above = ""
    # the fields come first
    for line in itertools.takewhile(re.compile(r" {4}(?!def |@)|\n").match, lines[start:]):
        comment = line.partition("  # ")[2].strip()
        if field := re.match(r" {4}(\w+): ", line):
            name = field[1]
            texts[name] = f"{above} {comment}".strip()
        elif name and line.startswith((" " * 8, "    )")):  # of a field of several lines
            texts[name] = f"{texts[name]} {comment}".strip()
        above = f"{above} {line.strip(' #')}".strip() if line.startswith("    # ") else ""
    return texts


def unknown(kind: str, name: object, known: Iterable[object], *, also: str = "") -> str:
    """``unknown recipe 'bse'; known: base, quickstart``; ``also`` follows the known names."""
    return f"unknown {kind} {name!r}; known: {', '.join(map(str, known))}{also}"


def command(*words: object) -> str:
    """``llm2clip WORDS``, each word quoted if a shell would split or change it."""
    return shlex.join(["llm2clip", *map(str, words)])


def changed_options(config: Any, names: Iterable[str]) -> list[str]:
    """The options that set the fields ``names`` of a dataclass, for those that differ from their
    defaults."""
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    words: list[str] = []
    for name in names:
        value = getattr(config, name)
        option = NAMES.get(name, name).replace("_", "-")
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option if value else negative(option)}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    return words


# Paths that are mistyped every day, found before any library is loaded: an input that is not there,
# an output that would destroy something. What is at a path is for its reader to say.

DATA = "data"
LLM = "LLM"
ADAPTER = "adapter"
INPUTS = {  # field -> what is there
    **dict.fromkeys(
        ("path", "source.path", "data.path", "data.validation", "data", "train", "test"), DATA
    ),
    **dict.fromkeys(("pairs.data", "measure.captions", "evaluation.captions"), DATA),
    **dict.fromkeys(("encoder.llm", "teacher.llm", "llm", "tokenizer"), LLM),
    **dict.fromkeys(("encoder.adapter", "teacher.adapter", "adapter"), ADAPTER),
}
OUTPUTS = ("output_dir", "cache", "output", "json")  # fields with a file or folder to write
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


def check_paths(command: Command[Any], argv: Sequence[str]) -> None:
    """Raise FileNotFoundError, FileExistsError or ValueError that names a path and what to do, or
    as ``read``."""
    values, _ = command.read(argv)
    given: list[tuple[str, str]] = []
    for name in command.leaves:
        value = values.get(name)
        items = value if isinstance(value, tuple | list) else [value]
        given += [(name, str(item)) for item in items if item and isinstance(item, (str, Path))]
    for name, path in given:
        kind = INPUTS.get(name)
        wanted = f"expected {command.leaves[name].help}"
        written = command.written(name)
        # a Hub id, a URL, a wildcard or braces is not missing
        if kind == DATA:
            is_local = not (glob.has_magic(path) or "{" in path)
        else:
            is_local = can_only_be_a_path(path)
        is_local = is_local and "://" not in path
        if kind and is_local and not os.path.exists(os.path.expanduser(path)):
            raise FileNotFoundError(f"no {kind} at {path}; {wanted}")
        if kind == LLM and os.path.isfile(f"{path}/config.json") and not _has_any(path, TOKENIZERS):
            raise FileNotFoundError(f"{written} {path} has no tokenizer; {wanted}")
        replaceable = command.name not in KINDS and path.endswith((".json", ".html"))
        if name in OUTPUTS and os.path.isfile(path) and not replaceable:
            raise FileExistsError(f"{written} {path} exists and would be lost; choose another path")
    if command.name in KINDS and not values.get("dry_run"):
        _check_folder(
            command.name,
            os.path.expanduser(values["output"]),
            given,
            overwrite=bool(values.get("overwrite")),
        )


def _check_folder(
    command: str, output: str, given: list[tuple[str, str]], *, overwrite: bool
) -> None:
    """Raise as ``check_paths`` for a folder that a command writes as a whole; ``given``: its fields
    with a path."""
    if not _has_any(output, ("*",)):
        return
    if not overwrite:
        raise FileExistsError(
            f"{output} exists and is not empty; choose another path or pass --overwrite"
        )
    for name, path in given:
        if name == "output" or not os.path.exists(path):
            continue
        if Path(path).resolve().is_relative_to(Path(output).resolve()):
            problem = f"--output {output} has the input {path}, which --overwrite would delete"
            raise ValueError(f"{problem}; choose another")
    refuse_foreign(Path(output), KINDS[command])


def _has_any(folder: str, patterns: Iterable[str]) -> bool:
    return any(next(Path(folder).glob(pattern), None) for pattern in patterns)
