"""What a sample is: a key, the bytes of an image, captions that each have a kind and a language."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Caption:
    """One text about an image."""

    text: str
    kind: str = "short"  # short | long | keywords, or any word that the configuration names
    language: str = "en"


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as it lies in a source."""

    key: str  # name within its shard; a label, never a path
    image: bytes  # the file's bytes: JPEG, PNG or WebP
    captions: tuple[Caption, ...]
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's own JSON


class BrokenSample(ValueError):  # noqa: N818 - it names what was found, as StopIteration does
    """A sample that can't be used: which shard, which key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"sample {key!r} of shard {shard!r}: {reason}")
        self.shard = shard
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BrokenSample], tuple[str, str, str]]:
        return BrokenSample, (self.shard, self.key, self.reason)  # crosses process borders whole


def caption_hash(text: str) -> str:
    """Identity of a caption: the first 16 hexadecimal characters of its SHA-256 (64 bits)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def caption_id(text: str) -> int:
    """``caption_hash`` as a signed 64-bit integer, to fit a torch.int64 tensor."""
    value = int(caption_hash(text), 16)
    return value - (1 << 64) if value >= 1 << 63 else value
