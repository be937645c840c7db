"""Settings given as ``NAME=VALUE`` words, for losses and optimizers, whose settings the configuration does not list."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar

Member = TypeVar("Member")


def from_named_args(member: type[Member], words: Sequence[str], *, where: str) -> Member:
    """An instance of the dataclass ``member``: fields from ``words``, the others with their defaults.

    Raises ValueError for a word that is not NAME=VALUE, an unknown field, or a value of another type than the
    field's default; ``where`` is the option, for the message.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(member)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in defaults:
            known = ", ".join(f"{name}={default}" for name, default in defaults.items()) or "none"
            raise ValueError(f"{where}: unknown setting {word!r} of {member.__name__}; known: {known}")
        expected = type(defaults[name])
        try:
            value = text if expected is str else json.loads(text.lower() if expected is bool else text)
        except ValueError:
            value = None
        value = float(value) if expected is float and type(value) is int else value
        if type(value) is not expected:
            raise ValueError(f"{where}: {name} is {text!r}, expected {expected.__name__}")
        values[name] = value
    return member(**values)
