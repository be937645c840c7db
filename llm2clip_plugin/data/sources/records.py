"""What a sample is: a key, an image, and captions that each have a kind and a language."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WORDS = re.compile(r"\w+")


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


def words_of(text: str) -> str:
    """The words of a text, so that texts are compared without case and punctuation."""
    return " ".join(WORDS.findall(text.casefold()))


def hash_hex(value: int) -> str:
    """A caption hash as the 16 hexadecimal characters that manifests and messages show."""
    return value.to_bytes(8, "big", signed=True).hex()
