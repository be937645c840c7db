"""A data source whose rows are in memory: a benchmark's images and captions, a folder of images, or prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.records import BrokenSample, Caption, Record, Sample

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")


@dataclass(frozen=True)
class Row:
    """One image and its captions."""

    key: str
    image: Path | Callable[[], bytes] | None  # None: captions only
    captions: tuple[Caption, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


class InMemorySource(Source):
    """One shard of rows, called ``name``. Captions are kept as they are: a benchmark counts a duplicate twice."""

    def __init__(self, name: str, folder: Path, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError(f"{name}: no images found in {folder}")
        self.rows = list(rows)
        super().__init__(SourceConfig(path=str(folder)), (Shard(name, len(rows), 0),))
        self.name = name

    def record(self, number: int) -> Record:
        self.place(number)
        row = self.rows[number]
        return Record(row.key, {}, row.meta, partial(self._read_image, row))

    def __getitem__(self, number: int) -> Sample:
        return replace(super().__getitem__(number), captions=self.rows[number].captions)

    def _read_image(self, row: Row) -> bytes:
        if row.image is None:
            raise BrokenSample(self.name, row.key, "the row has no image")
        try:
            return row.image.read_bytes() if isinstance(row.image, Path) else row.image()
        except OSError as error:
            raise BrokenSample(self.name, row.key, f"no image at {row.image}: {error.strerror}") from error


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS)
