"""A command, whose options are the fields of nested dataclasses: its command line becomes settings.

A setting is a field, ``optim.lr``. Its option is the last part, ``--lr``, where only one field of
the command ends in it, else the dotted name, or the name that it or its section declares. The
dotted name, the last part and the names of other programs are understood too, with dashes or
underscores.
"""

import difflib
import functools
import re
import textwrap
import typing
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Generic, TypeVar

from llm2clip_plugin.bounds import check_number
from llm2clip_plugin.json_files import from_plain
from llm2clip_plugin.options.help import WIDTH, row, written_default
from llm2clip_plugin.options.setting import Leaf, leaves_of
from llm2clip_plugin.options.text import negative
from llm2clip_plugin.options.values import AUTO, TRUTH, metavar_of, parse_value

Settings = TypeVar("Settings")

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
    # options that are no settings: name -> help
    extras: Mapping[str, str] = field(default_factory=dict)
    # fields of ``settings`` without an option, in addition to those that a section hides
    hidden: str = ""
    rest: str = ""  # field that takes the words after --
    # makes the settings that options override from the extra options; None: the fields' own
    # defaults
    default: Callable[[Mapping[str, str]], Settings] | None = None

    def parse(self, argv: Sequence[str]) -> Settings:
        """The settings of a command line. Prints --help and exits with status 0 if it is among the
        words. Raises ValueError for an unknown or missing option, an unusable value, one without
        effect, and what settings refuse."""
        values, extras = self.read(argv)
        default = self.default(extras) if self.default else None
        replaced: dict[str, Any] = {}
        for name, leaf in self.leaves.items():
            if leaf.setting.replaces and name in values:
                replaced[leaf.setting.replaces] = 0
        tree: dict[str, Any] = {}
        for name, value in {**replaced, **values}.items():
            *sections, last = name.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        config = from_plain(
            self.settings, tree, where=f"llm2clip {self.name}", default=default
        )
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
                    values[name] = parse_value(hint, texts)
                except ValueError as error:
                    raise ValueError(
                        f"--{self.options.get(name, name)}: {error}"
                    ) from None
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
        required = (
            name for name, leaf in self.leaves.items() if leaf.default is MISSING
        )
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
        words += [self.spelled(name) for name in required]
        return " ".join(["usage: llm2clip", self.name, *words, "[options]"])

    @functools.cached_property
    def leaves(self) -> dict[str, Leaf]:
        """Every field that is an option, or stands for one of ``arguments``, by dotted name."""
        default = self.default({}) if self.default else MISSING
        hidden = (*self.hidden.split(), self.rest)
        leaves = {}
        for name, leaf in leaves_of(self.settings, default):
            if not leaf.hidden and name not in hidden:
                leaves[name] = leaf
        return leaves

    @functools.cached_property
    def options(self) -> dict[str, str]:
        """Field -> the name of its option."""
        count = Counter(
            leaf.setting.option for leaf in self.leaves.values() if not leaf.named
        )
        names = {}
        for name, leaf in self.leaves.items():
            option = leaf.setting.option
            section = section_of(name)
            if section and not leaf.named and count[option] > 1:
                option = f"{section}.{option}"
            names[name] = option.replace("_", "-")
        return names

    @functools.cached_property
    def understood(self) -> dict[str, str]:
        """Name of an option, those of other programs too -> its field."""
        count = Counter(map(last_part, self.leaves))
        fields = {option: name for name, option in self.options.items()}
        assert len(fields) == len(self.options), (
            f"options with one name: {self.options}"
        )
        unique = {
            last_part(name): name for name in self.leaves if count[last_part(name)] == 1
        }
        also = {}
        for name, leaf in self.leaves.items():
            also |= dict.fromkeys(leaf.setting.also, name)
            for earlier in leaf.setting.formerly:
                also[earlier] = name
                also[f"{section_of(name)}.{earlier}"] = name
        for names in (also, {name: name for name in self.leaves}, unique):
            for name, dotted_name in names.items():
                fields.setdefault(name.replace("_", "-"), dotted_name)
        elsewhere = {
            name: fields[option] for name, option in ALSO.items() if option in fields
        }
        return {**elsewhere, **fields}

    def _option(self, word: str, waiting: deque[str]) -> tuple[str, Any, list[str]]:
        """The field, or extra option, of a word, its type, its values in the words after it;
        ValueError if unknown."""
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        flags: list[str] = []
        for understood, dotted_name in self.understood.items():
            if self.leaves[dotted_name].type in (bool, AUTO):
                flags.append(understood)
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
            option_names = [*self.understood, *self.extras, *map(negative, flags)]
            nearest = difflib.get_close_matches(name, option_names, n=1)
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
        alone = self.leaves[name].setting.alone if name in self.leaves else ""
        if alone and not NUMBER.match(next_word):
            return name, hint, [alone]
        most = 1
        if typing.get_origin(hint) is tuple:
            kinds = typing.get_args(hint)
            most = len(waiting) if kinds[-1] is Ellipsis else len(kinds)
        texts: list[str] = []
        while waiting and not OPTION.match(waiting[0]) and len(texts) < most:
            texts.append(waiting.popleft())
        return name, hint, texts

    def _refuse_without_effect(
        self, config: Settings, given: Mapping[str, Any]
    ) -> None:
        """Raise ValueError for a given option that another setting makes void."""
        for name, leaf in self.leaves.items():
            if not given.get(name):
                continue
            for need in leaf.setting.needs:
                value = functools.reduce(getattr, need.setting.split("."), config)
                # -1 steps are none
                is_set = value > 0 if isinstance(value, (int, float)) else bool(value)
                if is_set is need.absent:
                    other = self.written(need.setting) if not need.reason else ""
                    reason = need.reason or f"{'with' if is_set else 'without'} {other}"
                    raise ValueError(
                        f"{self.written(name)} has no effect {reason}; remove it"
                    )

    def spelled(self, name: str) -> str:
        """The option of a field with its value: ``--llm TEXT``."""
        option = self.options[name]
        leaf = self.leaves[name]
        if leaf.type == AUTO:
            return f"--{option} true|false|auto"
        if leaf.type is not bool:
            return f"--{option} {metavar_of(leaf.type, leaf.setting.unit)}"
        if leaf.default is True:
            return f"--{option}, --{negative(option)}"
        return f"--{option}"

    def help_text(self, *, everything: bool = False) -> str:
        """What ``--help`` prints, or ``--help-all``: an example, the usage, what the command does,
        and its options."""
        about = textwrap.fill(self.about, WIDTH)
        parts = [f"example:\n  {self.example}", self.usage, about]
        arguments = self.arguments.split()
        every = [*self.extras, *self.leaves]
        everyday = [
            self.understood.get(option, option) for option in self.everyday.split()
        ]
        chosen = every if everything or not everyday else everyday
        listed: dict[str, list[str]] = {}
        for name in dict.fromkeys([*arguments, *chosen]):
            if name in self.extras:
                line = row(f"--{name} {name.upper()}", self.extras[name])
                listed.setdefault("", []).append(line)
                continue
            leaf = self.leaves[name]
            spelled = self.written(name) if name in arguments else self.spelled(name)
            heading = leaf.heading if everything and name not in arguments else ""
            text = f"{leaf.setting.help}{written_default(leaf.default)}".strip()
            listed.setdefault(heading, []).append(row(spelled, text))
        for heading, rows in listed.items():
            parts.append("\n".join([f"{heading or 'options'}:", *rows]))
        if more := len({*every} - {*arguments, *chosen}):
            parts.append(
                f"`llm2clip {self.name} --help-all` lists {more} more options."
            )
        return "\n\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The settings of a command without any."""


def last_part(name: str) -> str:
    """``lr`` of ``optim.lr``."""
    return name.rpartition(".")[2]


def section_of(name: str) -> str:
    """``optim`` of ``optim.lr``; "" of ``seed``."""
    return name.rpartition(".")[0]
