"""The words of an option as a value of its field's type, and how --help writes that type."""

import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llm2clip_plugin.bounds import INT64

TRUTH = {"true": True, "false": False}
AUTO = bool | Literal["auto"]  # a flag that may be left to the program
METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


def parse_value(hint: Any, texts: Sequence[str]) -> Any:
    """The words of an option as a value of its type. Raises ValueError."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        if texts in ([""], ["none"]):
            return ()
        return tuple(parse_value(arguments[0], [text]) for text in texts)
    count = len(arguments) if origin is tuple else 1
    if len(texts) != count:
        raise ValueError(f"expected {count} {'values' if count > 1 else 'value'}")
    if origin is tuple:
        return tuple(parse_value(arguments[0], [text]) for text in texts)
    text = texts[0]
    if hint == AUTO:
        return "auto" if text.lower() == "auto" else parse_value(bool, texts)
    if origin in (typing.Union, types.UnionType):  # an optional value
        return None if text.lower() == "none" else parse_value(arguments[0], texts)
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


def metavar_of(hint: Any, unit: str = "") -> str:
    """What --help writes for the value of an option, such as PATH ...; a number has its unit."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        metavar = metavar_of(arguments[0], unit)
        if arguments[-1] is Ellipsis:
            return f"{metavar} ..."
        return " ".join([metavar] * len(arguments))
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(filter(None, arguments))
    return unit.upper() or METAVARS.get(arguments[0] if arguments else hint, "VALUE")
