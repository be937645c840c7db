"""Sources that are one file of rows, with the images in a folder or at a URL."""

from __future__ import annotations

import errno
import json
import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.data.index import KeptRows, Rows, RowsInMemory, open_kept_rows
from llm2clip_plugin.data.remote import is_url, read_file
from llm2clip_plugin.data.samples import BrokenSample, Record, well_formed
from llm2clip_plugin.data.sources.base import Source, SourceConfig

NO_IMAGE = "no image "  # how the reason begins if there is no such file
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class RowSource(Source):
    """A row is a sample: an object whose fields name the image, the key and the captions.

    Rows stay JSON and are parsed one at a time. With a ``rows_version``, where each row is in the file is kept in an
    index for later starts, and nothing of the file stays in memory.
    """

    rows_version = 0  # of ``read_rows`` and ``values``, to be raised when they change; 0: the file is read every time

    def __init__(self, config: SourceConfig, opened: KeptRows | None = None) -> None:
        self._downloads = config.downloads
        self._images = config.images or config.path.rpartition("/")[0] or "."
        self._rows = opened or self._open_rows(config)
        if not is_url(self._images) and not os.path.isdir(self._images):
            raise FileNotFoundError(
                f"image folder {self._images} does not exist; --image-folder must be that of {config.path}"
            )
        super().__init__(config, self._rows.shards)
        self.images_at_hand = not is_url(self._images)
        if isinstance(self._rows, KeptRows):
            self.kept, self.stamps = self._rows.kept, self._rows.stamps

    def __reduce__(self) -> tuple[type[RowSource], tuple[object, ...]]:
        return type(self), (self.config, self._rows) if isinstance(self._rows, KeptRows) else (self.config,)

    def _open_rows(self, config: SourceConfig) -> KeptRows | RowsInMemory:
        path = self._downloads.fetch(config.path) if is_url(config.path) else Path(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        stem = config.path.rpartition("/")[2].rpartition(".")[0]

        def read() -> RowsInMemory:
            try:
                rows = RowsInMemory(stem, *self.read_rows(path))
                if not rows.shards:
                    raise ValueError(f"{config.path} contains no samples")
            except ValueError:
                if is_url(config.path):
                    self._downloads.forget(config.path)  # so that the next start downloads it again
                raise
            return rows

        if not self.rows_version:
            return read()
        return open_kept_rows(path, f"{path.name}-{self.rows_version}.index", self._downloads.folder, read)

    @abstractmethod
    def read_rows(self, path: Path) -> Rows:
        """The rows of a file; ``pack_rows`` makes them from any objects."""

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """What captions are read from; KeyError, TypeError or AttributeError for a row without it."""
        return row

    @property
    def images_folder(self) -> str:
        """The folder or URL that images are relative to, as it was given."""
        return self._images

    def row(self, number: int) -> bytes:
        """A sample's JSON as it is stored."""
        return self._rows.row(*self.place(number))[1]

    def record(self, number: int) -> Record:
        position = self.place(number)
        shard = self.shards[position[0]].name
        line, data = self._rows.row(*position)
        try:
            row = json.loads(data)
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
            return read_file(os.path.join(self._images, name))
        except OSError as error:
            if not isinstance(error, MISSING) and error.errno != errno.ENAMETOOLONG:
                raise  # a disk or a connection fails
            what = "access denied to image " if isinstance(error, PermissionError) else NO_IMAGE
            raise BrokenSample(shard, key, f"{what}{shown!r} in {self._images} (--image-folder)") from error


def pack_rows(items: Iterable[tuple[int, Any]]) -> Rows:
    """Rows from (number for messages, object that JSON can hold)."""
    spans, rows = array("q"), bytearray()
    for number, item in items:
        row = json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass")
        spans.extend((len(rows), len(rows) + len(row), number))
        rows += row
    return np.array(spans, dtype=np.int64).reshape(-1, 3), bytes(rows)
