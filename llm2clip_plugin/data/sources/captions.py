"""Which fields of a sample are captions: ``caption=short``, ``long_caption=long``, ``de=short:de``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip_plugin.data.sources.records import Caption

# "txt" is a tar's .txt member, "gpt" the answer in LLaVA's JSON, every other name a field of the sample's JSON.
DEFAULT_FIELDS = (
    "txt=short",
    "caption=short",
    "short_caption=short",
    "long_caption=long",
    "captions=short",
    "gpt=short",
)


@dataclass(frozen=True)
class CaptionField:
    """A field that holds captions, with their kind and language."""

    name: str
    kind: str
    language: str


def parse_fields(specifications: Sequence[str], language: str) -> tuple[CaptionField, ...]:
    """Parse ``NAME=KIND`` (in ``language``) or ``NAME=KIND:LANGUAGE``.

    Raises ValueError for another form, no fields at all, or a duplicate name.
    """
    fields: dict[str, CaptionField] = {}
    for text in specifications:
        name, equals, rest = text.partition("=")
        kind, _, own_language = rest.partition(":")
        if not (name and equals and kind):
            raise ValueError(
                f"invalid caption field {text!r}; expected NAME=KIND or NAME=KIND:LANGUAGE, such as long_caption=long"
            )
        if name in fields:
            raise ValueError(f"duplicate caption field {name!r} in {', '.join(specifications)}")
        fields[name] = CaptionField(name, kind, own_language or language)
    if not fields:
        raise ValueError("no caption fields configured; set at least one with --fields, such as caption=short")
    return tuple(fields.values())


def read_captions(values: dict[str, Any], fields: Sequence[CaptionField]) -> tuple[tuple[Caption, ...], int]:
    """The captions among a sample's ``values`` in the order of ``fields``, and how many more are blank.

    A value is a text, a list of texts, an object {language: text}, or a list of objects
    ``{"text": ..., "kind": ..., "language": ...}``, whose kind and language take precedence over the field's. Texts are
    stripped, repetitions within the sample dropped. Raises ValueError for another shape.
    """
    captions = [caption for field in fields for caption in _expand(values.get(field.name), field)]
    distinct = dict.fromkeys(caption for caption in captions if caption.text)
    return tuple(distinct), sum(not caption.text for caption in captions)


def _expand(value: Any, field: CaptionField) -> Iterator[Caption]:
    """Captions of one field's value, blank ones included."""
    if value is None:
        return
    if isinstance(value, str):
        yield Caption(_clean(value), field.kind, field.language)
    elif isinstance(value, list):
        for item in value:
            yield from _expand(item, field)
    elif isinstance(value, dict) and "text" in value:
        if not isinstance(value["text"], str):
            raise ValueError(f"caption field {field.name!r} has text of type {type(value['text']).__name__}")
        kind, language = value.get("kind") or field.kind, value.get("language") or field.language
        yield Caption(_clean(value["text"]), well_formed(str(kind)), well_formed(str(language)))
    elif isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        for language, text in value.items():
            yield Caption(_clean(text), field.kind, well_formed(language))
    else:
        raise ValueError(
            f"caption field {field.name!r} has type {type(value).__name__}; expected a text, a list of "
            "texts, {language: text}, or objects with a text"
        )


def _clean(text: str) -> str:
    return well_formed(text.strip())


def well_formed(text: str) -> str:
    """The text with surrogates, which JSON allows and UTF-8 does not: pairs joined, lone ones replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
