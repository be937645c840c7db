"""What a sample is: a key, an image, and captions that each have a kind and a language."""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from llm2clip_plugin.files import check_image_size

# "txt" is a tar's .txt member, "gpt" the answer in LLaVA's JSON, every other name a field of the sample's JSON.
DEFAULT_FIELDS = (
    "txt=short",
    "caption=short",
    "short_caption=short",
    "long_caption=long",
    "captions=short",
    "gpt=short",
)
WORDS = re.compile(r"\w+")
# What PIL raises for damaged files: its own errors, and those that its decoders let through.
DAMAGE = (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
# Palette images with partial transparency are read as they should be; PIL advises RGBA once a process.
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)


@dataclass(frozen=True)
class Caption:
    """One text about an image."""

    text: str
    kind: str = "short"  # short | long | keywords, or any word that the configuration names
    language: str = "en"


@dataclass(frozen=True)
class Sample:
    """One image with its captions. The image is read when ``read_image`` is called, the rest is in memory."""

    key: str  # name within its shard; a label, never a path
    values: dict[str, Any] = field(compare=False)  # what captions are read from, by the names in ReadConfig.fields
    meta: dict[str, Any]  # the sample's own JSON
    read_image: Callable[[], bytes] = field(compare=False)  # JPEG, PNG or WebP; raises BrokenSample if it is missing
    captions: tuple[Caption, ...] = ()
    blank_captions: int = 0  # captions without text, which ``captions`` leaves out


class BrokenSample(ValueError):  # noqa: N818 - an event of the data, as StopIteration is of a loop
    """A sample that can't be used: which shard, which key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"sample {key!r} of shard {shard!r}: {reason}")
        self.shard = shard
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BrokenSample], tuple[str, str, str]]:
        return BrokenSample, (self.shard, self.key, self.reason)  # an exception pickles its message alone


@dataclass(frozen=True)
class CaptionField:
    """A field that holds captions, with their kind and language."""

    name: str
    kind: str
    language: str


def parse_fields(specifications: Sequence[str], language: str) -> tuple[CaptionField, ...]:
    """Parse ``NAME=KIND`` or ``NAME=KIND:LANGUAGE``; ValueError for another form, no fields, or a duplicate name."""
    fields: dict[str, CaptionField] = {}
    for text in specifications:
        name, equals, rest = text.partition("=")
        kind, _, own_language = rest.partition(":")
        if not (name and equals and kind):
            raise ValueError(
                f"invalid caption field {text!r}; expected NAME=KIND or NAME=KIND:LANGUAGE, as in txt=long"
            )
        if name in fields:
            raise ValueError(f"duplicate caption field {name!r} in {', '.join(specifications)}")
        fields[name] = CaptionField(name, kind, own_language or language)
    if not fields:
        raise ValueError("no caption fields configured; set at least one with --fields, such as caption=short")
    return tuple(fields.values())


def read_captions(values: dict[str, Any], fields: Sequence[CaptionField]) -> tuple[tuple[Caption, ...], int]:
    """The distinct captions, stripped, among a sample's ``values`` in the order of ``fields``, and how many are blank.

    A value is a text, an object {language: text}, an object ``{"text": ..., "kind": ..., "language": ...}``, whose kind
    and language take precedence over the field's, or a list of these. Raises ValueError for another shape.
    """
    captions = [caption for field in fields for caption in _captions(values.get(field.name), field)]
    distinct = dict.fromkeys(caption for caption in captions if caption.text)
    return tuple(distinct), sum(not caption.text for caption in captions)


def _captions(value: Any, field: CaptionField) -> Iterator[Caption]:
    """Captions of one field's value, blank ones included."""
    if isinstance(value, str):
        yield Caption(well_formed(value.strip()), field.kind, field.language)
    elif isinstance(value, list):
        for item in value:
            yield from _captions(item, field)
    elif isinstance(value, dict) and isinstance(value.get("text"), str):
        kind, language = value.get("kind") or field.kind, value.get("language") or field.language
        yield Caption(well_formed(value["text"].strip()), well_formed(str(kind)), well_formed(str(language)))
    elif isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        for language, text in value.items():
            yield Caption(well_formed(text.strip()), field.kind, well_formed(language))
    elif value is not None:
        expected = "a text, a list of texts, {language: text}, or objects with a text"
        raise ValueError(f"caption field {field.name!r} has type {type(value).__name__}; expected {expected}")


def well_formed(text: str) -> str:
    """The text with surrogates, which JSON allows and UTF-8 does not: pairs joined, lone ones replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def select_captions(
    captions: Iterable[Caption], kinds: Sequence[str] = (), languages: Sequence[str] = ()
) -> tuple[Caption, ...]:
    """The captions of these kinds and languages, in order; an empty sequence allows all."""
    return tuple(
        caption
        for caption in captions
        if (not kinds or caption.kind in kinds) and (not languages or caption.language in languages)
    )


def caption_hash(text: str) -> int:
    """The first 64 bits of the text's SHA-256, as a signed integer that fits a torch.int64 tensor."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def hash_hex(value: int) -> str:
    """A caption hash as the 16 hexadecimal characters that manifests and messages show."""
    return value.to_bytes(8, "big", signed=True).hex()


def words_of(text: str) -> str:
    """The words of a text, so that texts are compared without case and punctuation."""
    return " ".join(WORDS.findall(text.casefold()))


def parse_weights(specifications: Sequence[str]) -> dict[str, float]:
    """``KIND=WEIGHT`` as in ``short=1``. Raises ValueError for another form, a duplicate, or a weight not above 0."""
    weights: dict[str, float] = {}
    for text in specifications:
        kind, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not (kind and equals and 0 < weight < float("inf")):
            raise ValueError(f"caption weight {text!r} is not KIND=WEIGHT with a number above 0, as in short=1 long=1")
        if kind in weights:
            raise ValueError(f"caption weights {' '.join(specifications)} name {kind!r} twice")
        weights[kind] = weight
    return weights


def caption_shares(captions: Sequence[Caption], weights: Mapping[str, float]) -> list[float]:
    """(m) probabilities: a kind's is its weight among the kinds that the sample has, shared by its captions.
    Without ``weights`` all are equal. Raises KeyError for a caption of a kind without a weight."""
    if not weights:
        return [1 / len(captions)] * len(captions)
    counts = Counter(caption.kind for caption in captions)
    total = sum(weights[kind] for kind in counts)
    return [weights[caption.kind] / counts[caption.kind] / total for caption in captions]


def choose_caption(captions: Sequence[Caption], weights: Mapping[str, float], rng: random.Random) -> Caption:
    """One caption, drawn with one number of ``rng``."""
    if not weights:
        return captions[rng.randrange(len(captions))]
    draw = rng.random()
    for caption, share in zip(captions, caption_shares(captions, weights), strict=True):
        draw -= share
        if draw < 0:
            return caption
    return captions[-1]  # the shares add up to 1 but for rounding


def choose_captions(
    captions: Sequence[Caption], weights: Mapping[str, float], count: int, rng: random.Random
) -> tuple[Caption, ...]:
    """``count`` captions, drawn without replacement until none is left, then again from all."""
    chosen: list[Caption] = []
    left: list[Caption] = []
    while len(chosen) < count:
        left = left or list(captions)
        chosen.append(choose_caption(left, weights, rng))
        left.remove(chosen[-1])
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images."""

    scale: tuple[float, float] = (0.9, 1.0)  # smallest and largest area of the crop, a fraction of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest width / height of the crop; NaFlex: x its own
    flip: bool = False  # mirror half of the images; text in them is mirrored too
    rotate: float = 0.0  # degrees; the angle is uniform in -rotate .. rotate
    decode_margin: float = 1.0  # a JPEG is decoded to at least this many times the pixels a side that the crop needs

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop scale is {self.scale}, expected two numbers within 0 .. 1, the smaller first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop ratio is {self.ratio}, expected two numbers above 0, the smaller first")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate is {self.rotate}, expected degrees within 0 .. 180")


class BrokenImage(ValueError):  # noqa: N818
    """Bytes that are not an image, or a damaged one."""


def open_header(data: bytes) -> Image.Image:
    """The image, its pixels not yet decoded. Raises BrokenImage, also for more than MAX_PIXELS or MAX_ASPECT."""
    try:
        image = Image.open(io.BytesIO(data))
    except DAMAGE as error:
        raise BrokenImage(f"no image, or damaged ({len(data)} bytes, starting with {data[:8]!r})") from error
    try:
        check_image_size(*image.size)
    except ValueError as error:
        raise BrokenImage(str(error)) from error
    return image


def load(image: Image.Image, factor: int = 1) -> Image.Image:
    """Decode to RGB, a JPEG at 1/``factor`` of its size by its own transform. Raises BrokenImage."""
    try:
        if factor > 1 and image.format in ("JPEG", "MPO"):
            image.draft("RGB", (image.width // factor, image.height // factor))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGE as error:
        raise BrokenImage(f"cannot decode the image: {error}") from error


def has_transparency(image: Image.Image) -> bool:
    """Whether a pixel is not opaque; RGB then shows what is stored below it, mostly black. Raises BrokenImage."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return False
    try:
        return image.convert("RGBA").getextrema()[3][0] < 255  # type: ignore[index]
    except DAMAGE as error:
        raise BrokenImage(f"cannot decode the image: {error}") from error
