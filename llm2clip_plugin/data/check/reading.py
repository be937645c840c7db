"""Read every sample of a source once and decode its image at full size, in several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from llm2clip_plugin.data.check.options import CheckConfig
from llm2clip_plugin.data.decode import BrokenImage, has_transparency, load, open_header
from llm2clip_plugin.data.pool import cores, parallel
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, Sample, caption_hash, select_captions, words_of
from llm2clip_plugin.outside.timeouts import check_hub_answers

CHUNK = 64  # samples that a worker reads in one task


@dataclass
class Reading:
    """Counts and findings of some samples; readings add up."""

    samples: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)  # {"shard", "key", "reason"}
    without_captions: list[dict[str, str]] = field(default_factory=list)  # the same; intact, but no selected caption
    blank_captions: int = 0
    replaced_characters: int = 0  # captions with U+FFFD, which replaces invalid UTF-8
    captions: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, language) -> captions
    unused_fields: Counter[str] = field(default_factory=Counter)  # fields with a text of words that is no caption
    nested_captions: int = 0  # samples with a caption that contains another one
    formats: Counter[str] = field(default_factory=Counter)  # JPEG, PNG, WEBP
    transparent: int = 0  # images with pixels that are not opaque
    image_bytes: int = 0
    caption_rows: list[np.ndarray] = field(default_factory=list)  # (n, 4) int64: hash, sample, tokens, hash of words
    key_rows: list[np.ndarray] = field(default_factory=list)  # (n, 2) int64: hash of the key, sample
    image_rows: list[np.ndarray] = field(default_factory=list)  # (n, 4) int64: hash of the file, sample, width, height

    def add(self, other: Reading) -> None:
        """Add another reading to this one."""
        for each in dataclasses.fields(self):
            total = getattr(self, each.name)
            total += getattr(other, each.name)  # lists and counters grow in place
            setattr(self, each.name, total)

    def rows(self, name: str, columns: int) -> np.ndarray:
        """(n, columns) int64: all of ``caption_rows``, ``key_rows`` or ``image_rows``."""
        return np.concatenate([np.zeros((0, columns), dtype=np.int64), *getattr(self, name)])


def read_all(source: Source, config: CheckConfig) -> Iterator[Reading]:
    """A reading of each chunk of a source."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are parallel already
    chunks = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    processes = min(config.workers or cores(), len(chunks))
    return parallel(partial(read_samples, source, config), chunks, processes=processes)


@lru_cache
def load_counter(tokenizer: str) -> Callable[[str], int]:
    """Length of a caption: tokens of ``tokenizer``, special ones included, or words for "". Raises ValueError."""
    if not tokenizer:
        return lambda text: len(text.split())
    from transformers import AutoTokenizer

    try:
        if not Path(tokenizer).is_dir():
            check_hub_answers(tokenizer)
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except OSError as error:
        raise ValueError(f"cannot load the tokenizer {tokenizer!r}: {error}") from error
    return lambda text: len(loaded(text, verbose=False)["input_ids"])


def read_samples(source: Source, config: CheckConfig, numbers: range) -> Reading:
    """Read some samples of a source and decode their images at full size."""
    reading, count = Reading(samples=len(numbers)), load_counter(config.tokenizer)
    caption_rows, key_rows, image_rows = [], [], []
    used = {item.name for item in source.fields}
    for number in numbers:
        key, captions, reason = "", (), ""
        try:
            sample = source.with_image(number)
            key, captions = sample.key, sample.captions
            reading.blank_captions += sample.blank_captions
            reading.unused_fields.update(name for name in sample.meta.keys() - used if _is_text(sample.meta[name]))
            value, size = _read_image(sample, reading)
            image_rows.append((value, number, *size))
        except BrokenSample as error:
            key, reason = error.key, error.reason
        except BrokenImage as error:
            reason = str(error)
        key_rows.append((caption_hash(key), number))
        caption_rows += _read_captions(captions, number, count, reading)
        identity = {"shard": source.locate(number)[0], "key": key}
        if reason:
            reading.broken.append({**identity, "reason": reason})
        elif not select_captions(captions, config.kinds, config.languages):
            reason = "no caption of the selected kinds and languages" if captions else "no caption"
            reading.without_captions.append({**identity, "reason": reason})
    reading.caption_rows.append(np.array(caption_rows, dtype=np.int64).reshape(-1, 4))
    reading.key_rows.append(np.array(key_rows, dtype=np.int64).reshape(-1, 2))
    reading.image_rows.append(np.array(image_rows, dtype=np.int64).reshape(-1, 4))
    return reading


def _is_text(value: object) -> bool:
    """Whether a field may be a caption: words, not a name, a hash or JSON."""
    return isinstance(value, str) and " " in value.strip() and not value.startswith(("{", "["))


def _read_image(sample: Sample, reading: Reading) -> tuple[int, tuple[int, int]]:
    """Decode the image and count it; a hash, width and height. Raises BrokenSample or BrokenImage."""
    data = sample.read_image()
    image = open_header(data)
    image_format, size = image.format or "?", image.size
    transparent = has_transparency(image)
    load(image)
    reading.transparent += transparent
    reading.formats[image_format] += 1
    reading.image_bytes += len(data)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True), size


def _read_captions(
    captions: tuple[Caption, ...], number: int, count: Callable[[str], int], reading: Reading
) -> Iterator[tuple[int, int, int, int]]:
    words = [words_of(caption.text) for caption in captions]
    distinct = {f" {text} " for text in words}
    reading.nested_captions += any(one != other and one in other for one in distinct for other in distinct)
    for caption, text in zip(captions, words, strict=True):
        reading.captions[caption.kind, caption.language] += 1
        reading.replaced_characters += "\ufffd" in caption.text
        yield caption_hash(caption.text), number, count(caption.text), caption_hash(text)
