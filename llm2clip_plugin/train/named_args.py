"""Settings given as ``NAME=VALUE`` words, for losses and optimizers, whose settings the configuration does not list."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from llm2clip_plugin.outside.values import from_plain

Member = TypeVar("Member")


def from_named_args(member: type[Member], words: Sequence[str], *, where: str) -> Member:
    """An instance of the dataclass ``member``: fields from ``words``, the others with their defaults.

    Raises ValueError for a word that is not NAME=VALUE, an unknown field, or a value of another type; ``where`` is the
    option, for the message.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{where}: {word!r} is not NAME=VALUE")
        try:
            values[name] = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            values[name] = text
    return from_plain(member, values, where=f"{where} of {member.__name__}")
