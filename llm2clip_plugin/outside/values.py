"""What comes from outside is checked before it is used: JSON files, the types and bounds of their fields, names.

Standard library only, as ``contracts``, which re-exports ContractError.
"""

import codecs
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

MAX_WIDTH = 1 << 17  # of a hidden state, an embedding or an MLP; the largest LLMs of today have 1 << 14
MAX_LAYERS = 1 << 10
MAX_SIDE = 1 << 14  # along a side of a tower's image


class ContractError(ValueError):
    """A file is damaged or does not match what its reader expects; the message names the file and the fix."""


def printable(text: str) -> str:
    """A text from outside with control characters, which a terminal would obey, as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def printable_lines(text: str) -> str:
    """As ``printable``, but line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def read_json_value(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises ContractError naming the file, OSError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} is not valid JSON ({error})") from error


def refuse_encoding(path: str | os.PathLike[str], start: bytes) -> None:
    """Raise ValueError unless the beginning of a text file is UTF-8; it may end within a character."""
    fix = f"iconv -f %s -t UTF-8 {path} > NEW{Path(path).suffix}"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16, expected UTF-8; convert it: {fix % 'UTF-16'}")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError as error:
        line = start[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8: byte {start[error.start]:#04x} at offset {error.start}, line {line}; if it is "
            f"Latin-1, convert it: {fix % 'LATIN1'}"
        ) from error


@contextmanager
def errors_about(path: object, *, fix: str = "") -> Iterator[None]:
    """What a library raises about a file of ours, of any type, as a ContractError that names the file.

    OSError, ContractError and a lack of memory pass: they name the file already, or a cause outside it.
    """
    try:
        yield
    except (OSError, ContractError):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = "" if isinstance(error, ValueError) and reason else type(error).__name__
        reason = ": ".join(part for part in (kind, reason) if part)
        raise ContractError(f"{path} cannot be used ({reason}){fix and '; '}{fix}") from error


def check_fields(record: type, values: Mapping[str, Any], *, where: str) -> None:
    """Compare values from a file with the annotations of a dataclass.

    Raises ContractError with the file, the key and the value.
    """
    hints = typing.get_type_hints(record)
    for item in fields(record):
        if item.name in values and (problem := type_problem(values[item.name], hints[item.name])):
            raise ContractError(f"{where}: {item.name}{problem}")


def type_problem(value: Any, expected: Any) -> str:
    """What is wrong with a JSON value for an annotation, "" if nothing.

    >>> type_problem({"a": "b"}, dict[str, int])
    ".a is 'b', expected int"
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return ""
    if origin in (typing.Union, types.UnionType):
        problems = [type_problem(value, one) for one in arguments]
        return "" if "" in problems else problems[0]
    if origin is typing.Literal:
        return "" if value in arguments else f" is {_short(value)}, expected one of {', '.join(map(repr, arguments))}"
    kind = origin or expected
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number if kind is float else isinstance(value, kind) and (kind is not int or is_number)
    if not fits:
        return f" is {_short(value)}, expected {getattr(kind, '__name__', kind)}"
    if isinstance(value, dict) and arguments:
        parts = [(f".{key}", part, arguments[1]) for key, part in value.items()]
    elif isinstance(value, list) and arguments:
        parts = [(f"[{number}]", part, arguments[0]) for number, part in enumerate(value)]
    else:
        return ""
    return next((f"{name}{problem}" for name, part, one in parts if (problem := type_problem(part, one))), "")


def check_range(value: Any, low: float, high: float, *, name: str, where: str) -> None:
    """Raise ContractError unless a number is finite and from ``low`` to ``high``; booleans and texts are no numbers."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ContractError(f"{where}: {name} is {_short(value)}, expected a number from {low:g} to {high:g}")


def check_whole(value: Any, low: int, high: int, *, name: str, where: str) -> None:
    """Raise ContractError unless a value is a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ContractError(f"{where}: {name} is {_short(value)}, expected a whole number from {low} to {high}")


def _short(value: Any) -> str:
    text = repr(value)
    return printable(text if len(text) <= 80 else text[:77] + "...")
