"""A data set given as a list of image files and captions: benchmarks, and the prompts of zero-shot classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.sources.base import RawSample, Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.records import BrokenSample, Caption


@dataclass(frozen=True)
class Row:
    """One image with its captions, as a benchmark's files say it."""

    key: str
    image: Path | None  # None: captions alone
    captions: tuple[Caption, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class ListedSource(Source):
    """One shard of rows. Captions are taken as they are: a benchmark counts a repeated one twice."""

    def __init__(self, name: str, folder: Path, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError(f"{name}: nothing is listed in {folder}")
        self.rows = list(rows)
        super().__init__(SourceConfig(path=str(folder)), (Shard(name, len(rows), 0),))
        self.name = name

    def raw(self, number: int) -> RawSample:
        self.place(number)
        row = self.rows[number]
        return RawSample(row.key, {}, row.meta)

    def image(self, number: int) -> bytes:
        row = self.rows[number]
        if row.image is None:
            raise BrokenSample(self.name, row.key, "it is text without an image")
        try:
            return row.image.read_bytes()
        except OSError as error:
            raise BrokenSample(self.name, row.key, f"no image at {row.image}: {error.strerror}") from error

    def _captions(self, number: int, raw: RawSample) -> tuple[Caption, ...]:
        return self.rows[number].captions
