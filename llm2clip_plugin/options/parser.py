"""``argparse`` with an example first, earlier names of options, and the nearest name for an unknown one."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llm2clip_plugin.options.names import ALSO, nearest, normal


class Parser(argparse.ArgumentParser):
    """A command's parser. Underscores are understood as dashes, earlier names of options as the names now."""

    def __init__(self, name: str, example: str, about: str, also: Mapping[str, str] | None = None) -> None:
        """``name``: as typed after llm2clip; ``also``: further names that are understood -> the option's."""
        super().__init__(
            prog=f"llm2clip {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.example = example
        self.also = {**ALSO, **(also or {})}

    def format_help(self) -> str:
        """argparse's text below an example."""
        return f"example:\n  {self.example}\n\n{super().format_help()}"

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse, with arguments anywhere among the options; an unknown option is answered with the nearest."""
        words = [self._translated(word) for word in (sys.argv[1:] if args is None else args)]
        options, rest = self.parse_known_intermixed_args(words, namespace)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
            shown = [action.option_strings[0] for action in self._actions if action.option_strings]
            hint = nearest(unknown, shown, str) if unknown.startswith("-") else ""
            self.error(f"unknown {'option' if unknown.startswith('-') else 'argument'} {unknown}{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        """One line, and exit status 2."""
        self.exit(2, f"error: {message}; `{self.prog} --help` lists the options\n")

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
