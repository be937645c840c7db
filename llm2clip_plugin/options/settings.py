"""Settings from the words of a command line: each option's words to the type of its field, then the dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from llm2clip_plugin.options.names import nearest

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
