"""Sources that are one file of rows, with the images in a folder or at a URL."""

from __future__ import annotations

import errno
import json
import mmap
import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.captions import well_formed
from llm2clip_plugin.data.sources.records import BrokenSample, Record
from llm2clip_plugin.data.sources.urls import is_url

ROWS_PER_SHARD = 16384
NO_IMAGE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
Rows = tuple[np.ndarray, bytes | mmap.mmap]  # (rows, 3) int64: start, stop, number for messages; and all rows as JSON


class RowSource(Source):
    """A row is a sample: an object whose fields name the image, the key and the captions.

    Rows stay JSON in one block of bytes, which forked workers share, and are parsed one at a time.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._downloads = config.downloads
        path = self._downloads.fetch(config.path) if is_url(config.path) else Path(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        self._spans, self._json = self.read_rows(path)
        if not len(self._spans):
            raise ValueError(f"{config.path} contains no samples")
        self._images = config.images or config.path.rpartition("/")[0] or "."
        if not is_url(self._images) and not os.path.isdir(self._images):
            raise FileNotFoundError(
                f"image folder {self._images} does not exist; set --images to the folder of {config.path}'s images"
            )
        stem = config.path.rpartition("/")[2].rpartition(".")[0]
        super().__init__(config, row_shards(stem, len(self._spans)))

    def __reduce__(self) -> tuple[type[RowSource], tuple[SourceConfig]]:
        return type(self), (self.config,)

    @abstractmethod
    def read_rows(self, path: Path) -> Rows:
        """The rows of a file; ``pack_rows`` makes them from any objects."""

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """What captions are read from; KeyError, TypeError or AttributeError for a row without it."""
        return row

    def record(self, number: int) -> Record:
        shard = self.locate(number)[0]
        start, stop, line = self._spans[number].tolist()
        try:
            row = json.loads(self._json[start:stop])
        except (ValueError, RecursionError) as error:
            raise BrokenSample(shard, f"line {line}", f"not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise BrokenSample(shard, f"line {line}", f"contains a {type(row).__name__}, expected an object")
        key, image = row.get(self.config.key_field), row.get(self.config.image_field)
        key = well_formed(str(key) if key not in (None, "") else str(image or f"line {line}"))
        try:
            values = self.values(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise BrokenSample(shard, key, f"invalid conversations: {error!r}") from error
        return Record(key, values, row, partial(self._read_image, shard, key, image))

    def _read_image(self, shard: str, key: str, name: Any) -> bytes:
        if not isinstance(name, str) or not name:
            raise BrokenSample(shard, key, f"no image path in field {self.config.image_field!r}")
        shown = name if len(name) <= 100 else name[:97] + "..."  # a data: URI, say
        if os.path.isabs(name) or ".." in name.split("/") or "\0" in name or name != well_formed(name):
            raise BrokenSample(shard, key, f"image {shown!r} is not a path inside {self._images}")
        try:
            if is_url(self._images):
                return self._downloads.read(self._images.rstrip("/") + "/" + name)
            with open(os.path.join(self._images, name), "rb") as file:
                return file.read()
        except OSError as error:
            if not isinstance(error, NO_IMAGE) and error.errno != errno.ENAMETOOLONG:
                raise  # a disk or a connection fails
            raise BrokenSample(shard, key, f"no image {shown!r} in {self._images}") from error


def row_shards(stem: str, rows: int) -> tuple[Shard, ...]:
    """One shard, or several of a long file: ranks embed them in parallel, and a killed run loses one at most."""
    if rows <= ROWS_PER_SHARD:
        return (Shard(stem, rows, 0),)
    starts = range(0, rows, ROWS_PER_SHARD)
    return tuple(Shard(f"{stem}-{i:05}", min(ROWS_PER_SHARD, rows - start), start) for i, start in enumerate(starts))


def pack_rows(items: Iterable[tuple[int, Any]]) -> Rows:
    """Rows from (number for messages, object that JSON can hold)."""
    spans, rows = array("q"), bytearray()
    for number, item in items:
        row = json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass")
        spans.extend((len(rows), len(rows) + len(row), number))
        rows += row
    return np.array(spans, dtype=np.int64).reshape(-1, 3), bytes(rows)
