"""``argparse`` with an example first, earlier names of options, and the nearest name for an unknown one."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from llm2clip_plugin.options.names import ALSO, HELP, HELP_ALL, joined, nearest, normal


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
