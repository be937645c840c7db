"""JSON files from outside, and dataclasses from their values. Standard library only."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.outside import printable

Settings = TypeVar("Settings")


def read_json_value(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises ContractError naming the file, or OSError."""
    refuse_byte_order_mark(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} is not valid JSON ({error})") from error


def refuse_byte_order_mark(path: str | os.PathLike[str]) -> None:
    """Raise ContractError for a file that starts with UTF-8's mark, which no library reads as
    JSON. OSError for one that cannot be read."""
    with open(path, "rb") as file:
        start = file.read(len(codecs.BOM_UTF8))
    if start == codecs.BOM_UTF8:
        raise ContractError(
            f"{path} starts with a byte-order mark (BOM), expected JSON in plain UTF-8; save it "
            "without one"
        )


def parse_json(text: str | bytes) -> Any:
    """The value of a user's JSON text. Raises ValueError in one line, also for a text that is
    nested too deep, and for an object with a name twice, of which one value would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice; rename one")
    return values


def from_plain(
    kind: type[Settings], values: Any, *, where: str, default: Settings | None = None
) -> Settings:
    """A dataclass, and those in its fields, from parsed JSON; ``default`` gives the fields that
    ``values`` lacks. Raises ContractError for an unknown, missing or mistyped field, and what the
    dataclasses' own checks raise."""
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ContractError(
            f"{where} is {_short(values)}, expected an object with the fields {', '.join(fields)}"
        )
    values = _with_current_names(fields, values)
    if unknown := sorted(set(values) - set(fields)):
        raise ContractError(
            f"{where} has unknown fields {unknown}; known: {', '.join(fields)}"
        )
    hints = typing.get_type_hints(kind)
    arguments = {}
    missing = []
    for name, item in fields.items():
        usual = getattr(default, name) if default is not None else default_of(item)
        if name in values:
            at_field = f"{where}: {name}"
            arguments[name] = typed(hints[name], values[name], at_field, usual)
        elif usual is not dataclasses.MISSING:
            arguments[name] = usual
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = from_plain(hints[name], {}, where=f"{where}: {name}")
        else:
            missing.append(name)
    if missing:
        raise ContractError(f"{where} is missing the required fields {missing}")
    return kind(**arguments)


def _with_current_names(
    fields: dict[str, dataclasses.Field[Any]], values: dict[str, Any]
) -> dict[str, Any]:
    """The values by the names that fields have now; metadata ``formerly`` lists earlier ones."""
    current = dict(values)
    for name, item in fields.items():
        for earlier in item.metadata.get("formerly", ()):
            if earlier in current and name not in current:
                current[name] = current.pop(earlier)
    return current


def default_of(item: dataclasses.Field) -> Any:
    """A field's default; dataclasses.MISSING without one."""
    if item.default_factory is dataclasses.MISSING:
        return item.default
    return item.default_factory()


def typed(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    """A JSON value as the type of an annotation."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        settings = None if default is dataclasses.MISSING else default
        return from_plain(hint, value, where=where, default=settings)
    if origin in (typing.Union, types.UnionType):  # the first type, or None, or a word
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            if typing.get_origin(
                argument
            ) is typing.Literal and value in typing.get_args(argument):
                return typed(argument, value, where)
        return typed(arguments[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ContractError(
                f"{where} is {_short(value)}, expected one of {', '.join(map(repr, arguments))}"
            )
        return value
    kind: Any = origin or hint
    if kind is tuple and isinstance(value, (list, tuple)):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) != len(value):
            raise ContractError(
                f"{where} has {len(value)} values, expected {len(hints)}"
            )
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(
            typed(hint, item, f"{where}[{number}]") for number, (hint, item) in pairs
        )
    if kind is float and _is_number(value):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and not _is_number(value)):
        raise ContractError(f"{where} is {_short(value)}, expected {kind.__name__}")
    if kind is dict and arguments:
        return {
            key: typed(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if kind is list and arguments:
        return [
            typed(arguments[0], item, f"{where}[{number}]")
            for number, item in enumerate(value)
        ]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return printable(text if len(text) <= 80 else text[:77] + "...")
