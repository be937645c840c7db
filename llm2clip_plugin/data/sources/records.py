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


def caption_hash(text: str) -> int:
    """The first 64 bits of the text's SHA-256, as a signed integer that fits a torch.int64 tensor."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def hash_hex(value: int) -> str:
    """A caption hash as the 16 hexadecimal characters that manifests and messages show."""
    return value.to_bytes(8, "big", signed=True).hex()
