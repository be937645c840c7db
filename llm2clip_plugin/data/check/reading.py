"""Read every sample of a source once, images decoded in full, by several processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import numpy as np
import tyro

from llm2clip_plugin.data.images import BrokenImage, load, open_header
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, caption_hash

CHUNK = 64  # samples that a worker reads at a time


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SourceConfig):
    """Read a data set once, every image decoded, and report what is in it and what is broken.

    Ends with 1 if training on it would stop, else 0.
    """

    path: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")
    ]  # folder of tars, .tar, .jsonl, .json or URL
    weight: tyro.conf.Suppress[float] = 1.0
    shuffle_window: tyro.conf.Suppress[int] = 0
    tokenizer: str = ""  # folder or Hub id of the LLM's tokenizer, to count tokens; "" counts words
    max_tokens: int = 512  # tokens (or words): longer captions are counted, the teacher cuts them
    small_side: int = 32  # pixels: images with a shorter side are counted
    max_broken: float = 0.01  # share of broken samples over which training would stop
    show: int = 10  # broken samples, doubled captions ... shown of each sort; --json has all broken ones
    workers: int = 0  # processes; 0: one a core
    json: bool = False  # one JSON object on stdout, for machines


@dataclass
class Reading:
    """What was seen in some samples; readings add up."""

    samples: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)  # {"shard", "key", "reason"}
    without_captions: list[dict[str, str]] = field(default_factory=list)  # the same, of whole samples with none to use
    empty_captions: int = 0
    replaced_characters: int = 0  # captions with U+FFFD: bytes that were no UTF-8
    captions: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, language) -> captions
    caption_rows: list[np.ndarray] = field(default_factory=list)  # (n, 3) int64: id, sample's number, tokens
    key_rows: list[np.ndarray] = field(default_factory=list)  # (n, 2) int64: hash of the key, sample's number
    formats: Counter[str] = field(default_factory=Counter)  # JPEG, PNG, WEBP
    sides: list[tuple[int, int]] = field(default_factory=list)  # width, height
    image_bytes: int = 0

    def add(self, other: Reading) -> None:
        """Take in another reading."""
        self.samples += other.samples
        self.empty_captions += other.empty_captions
        self.replaced_characters += other.replaced_characters
        self.image_bytes += other.image_bytes
        self.broken += other.broken
        self.without_captions += other.without_captions
        self.caption_rows += other.caption_rows
        self.key_rows += other.key_rows
        self.sides += other.sides
        self.captions += other.captions
        self.formats += other.formats


def read_all(source: Source, config: CheckConfig) -> Iterator[Reading | None]:
    """A reading of each chunk, each followed by None for its other samples, so that progress counts samples."""
    chunks = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(chunks))
    if workers <= 1:
        yield from _spread(map(partial(read_samples, source, config, load_counter(config.tokenizer)), chunks))
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(source, config))
    try:
        yield from _spread(pool.map(_read_in_worker, chunks))
    finally:
        pool.shutdown(cancel_futures=True)  # at an error or Ctrl-C, don't read the rest


def _spread(readings: Iterator[Reading]) -> Iterator[Reading | None]:
    for reading in readings:
        yield reading
        for _ in range(reading.samples - 1):
            yield None


_worker: Callable[[range], Reading]  # of a pool's process: read_samples with what stays the same


def _begin_worker(source: Source, config: CheckConfig) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = partial(read_samples, source, config, load_counter(config.tokenizer))


def _read_in_worker(numbers: range) -> Reading:
    return _worker(numbers)


def load_counter(tokenizer: str) -> Callable[[str], int]:
    """Length of a caption: tokens of ``tokenizer`` with its special ones, or words for "". Raises ValueError."""
    if not tokenizer:
        return lambda text: len(text.split())
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except OSError as error:
        raise ValueError(f"no tokenizer at {tokenizer!r}: {error}") from error
    return lambda text: len(loaded(text, verbose=False)["input_ids"])


def read_samples(source: Source, config: CheckConfig, count: Callable[[str], int], numbers: range) -> Reading:
    """Read some samples of a source, their images decoded in full."""
    reading = Reading(samples=len(numbers))
    caption_rows, key_rows = [], []
    for number in numbers:
        key, captions = source.captions(number)
        key_rows.append((caption_hash(key), number))
        caption_rows += [(caption_hash(caption.text), number, count(caption.text)) for caption in captions]
        _note_captions(captions, reading)
        named = {"shard": source.locate(number)[0], "key": key}
        if reason := _why_broken(source, number, reading):
            reading.broken.append({**named, "reason": reason})
        elif not config.usable(captions):
            reason = "no caption" if not captions else "no caption of the wanted kinds and languages"
            reading.without_captions.append({**named, "reason": reason})
    reading.caption_rows.append(np.array(caption_rows, dtype=np.int64).reshape(-1, 3))
    reading.key_rows.append(np.array(key_rows, dtype=np.int64).reshape(-1, 2))
    return reading


def _note_captions(captions: tuple[Caption, ...], reading: Reading) -> None:
    """Count one sample's captions."""
    for caption in captions:
        reading.captions[caption.kind, caption.language] += 1
        reading.replaced_characters += "\ufffd" in caption.text


def _why_broken(source: Source, number: int, reading: Reading) -> str:
    """Read one sample, its image decoded in full, and count what it holds; why training can't use it, or ""."""
    try:
        reading.empty_captions += source.empty_captions(number)
        data = source.image(number)
        image = open_header(data)
        kind, size = image.format or "?", image.size
        load(image)
    except BrokenSample as error:
        return error.reason
    except BrokenImage as error:
        return str(error)
    reading.formats[kind] += 1
    reading.sides.append(size)
    reading.image_bytes += len(data)
    return ""
