"""The text of --help: an example, what the command does, its options of every day; --help-all has the others.

What an option means is the comment next to its field, so nothing is said twice.
"""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from llm2clip_plugin.options.declared import Declared
from llm2clip_plugin.options.settings import is_section, takes_several

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
