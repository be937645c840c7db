"""What comes from outside is checked before it is used: JSON files, the types and bounds of their fields, names.

Standard library only, as ``contracts``, which re-exports ContractError.
"""

import codecs
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")

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


def from_plain(kind: type[Settings], values: Any, *, where: str, default: Settings | None = None) -> Settings:
    """A dataclass, and those in its fields, from parsed JSON; ``default`` gives the fields that ``values`` lacks.

    Raises ContractError naming ``where`` and the field if one is unknown, missing or of another type, and what the
    dataclasses' own checks raise.
    """
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ContractError(f"{where} is {_short(values)}, expected an object with the fields {', '.join(known)}")
    if unknown := sorted(set(values) - set(known)):
        raise ContractError(f"{where} has unknown fields {unknown}; known: {', '.join(known)}")
    hints, given, missing = typing.get_type_hints(kind), {}, []
    for name, item in known.items():
        usual = getattr(default, name) if default is not None else default_of(item)
        if name in values:
            given[name] = typed(hints[name], values[name], f"{where}: {name}", usual)
        elif usual is not dataclasses.MISSING:
            given[name] = usual
        elif dataclasses.is_dataclass(hints[name]):
            given[name] = from_plain(hints[name], {}, where=f"{where}: {name}")
        else:
            missing.append(name)
    if missing:
        raise ContractError(f"{where} is missing the required fields {missing}")
    return kind(**given)


def default_of(item: dataclasses.Field) -> Any:
    """A field's default; dataclasses.MISSING without one."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def typed(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    """A JSON value as the type of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where=where, default=None if default is dataclasses.MISSING else default)
    if origin in (typing.Union, types.UnionType):  # an optional value: the other type comes first
        return None if value is None and type(None) in arguments else typed(arguments[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ContractError(f"{where} is {_short(value)}, expected one of {', '.join(map(repr, arguments))}")
        return value
    kind: Any = origin or hint
    if kind is tuple and isinstance(value, (list, tuple)):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) != len(value):
            raise ContractError(f"{where} has {len(value)} values, expected {len(hints)}")
        return tuple(typed(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(hints, value, strict=True)))
    if kind is float and _is_number(value):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and not _is_number(value)):
        raise ContractError(f"{where} is {_short(value)}, expected {kind.__name__}")
    if kind is dict and arguments:
        return {key: typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is list and arguments:
        return [typed(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_range(value: Any, low: float, high: float, *, name: str, where: str) -> None:
    """Raise ContractError unless a number is finite and from ``low`` to ``high``; booleans and texts are no numbers."""
    if not _is_number(value) or not math.isfinite(value) or not low <= value <= high:
        raise ContractError(f"{where}: {name} is {_short(value)}, expected a number from {low:g} to {high:g}")


def check_whole(value: Any, low: int, high: int, *, name: str, where: str) -> None:
    """Raise ContractError unless a value is a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ContractError(f"{where}: {name} is {_short(value)}, expected a whole number from {low} to {high}")


def _short(value: Any) -> str:
    text = repr(value)
    return printable(text if len(text) <= 80 else text[:77] + "...")
