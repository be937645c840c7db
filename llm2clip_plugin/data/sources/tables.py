"""A file of rows beside a folder of images: JSON Lines, or LLaVA's own JSON (human/gpt conversations)."""

from __future__ import annotations

import errno
import json
import mmap
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip_plugin.data.sources.base import RawSample, Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.captions import well_formed
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.data.sources.remote import is_url

ROWS_PER_SHARD = 16384
NO_IMAGE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class TableSource(Source):
    """One shard: a row is a sample. Rows stay bytes, shared by forked workers, and are parsed when asked for."""

    def __init__(self, config: SourceConfig, kind: str) -> None:
        self.kind = kind
        self._downloads = config.downloads
        path = self._downloads.fetch(config.path) if is_url(config.path) else Path(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"no {kind} file at {path}")
        self._lines, self._rows = _llava_rows(path) if kind == "llava" else _jsonl_rows(path)
        if not len(self._lines):
            raise ValueError(f"{config.path} holds no samples")
        self._images = config.images or config.path.rpartition("/")[0] or "."
        if not is_url(self._images) and not os.path.isdir(self._images):
            raise FileNotFoundError(f"no image folder at {self._images}; say where the images of {config.path} lie")
        stem = config.path.rpartition("/")[2].rpartition(".")[0]
        super().__init__(config, row_shards(stem, len(self._lines)))

    def __reduce__(self) -> tuple[type[TableSource], tuple[SourceConfig, str]]:
        return TableSource, (self.config, self.kind)

    def raw(self, number: int) -> RawSample:
        row, line = self._row(number)
        given, image = row.get(self.config.key_field), row.get(self.config.image_field)
        key = well_formed(str(given) if given not in (None, "") else str(image or f"line {line}"))
        values = dict(row)
        if self.kind == "llava":
            try:
                values["gpt"] = first_answer(row)
            except (KeyError, TypeError, AttributeError) as error:
                shard = self.locate(number)[0]
                raise BrokenSample(shard, key, f"its conversations can't be read: {error!r}") from error
        return RawSample(key, values, row)

    def image(self, number: int) -> bytes:
        raw = self.raw(number)
        name = raw.meta.get(self.config.image_field)
        if not isinstance(name, str) or not name:
            raise BrokenSample(
                self.locate(number)[0], raw.key, f"no field {self.config.image_field!r} that names an image"
            )
        shown = name if len(name) <= 100 else name[:97] + "..."  # a whole data: URI, say
        if os.path.isabs(name) or ".." in name.split("/") or "\0" in name or name != well_formed(name):
            raise BrokenSample(self.locate(number)[0], raw.key, f"image {shown!r} does not lie within {self._images}")
        try:
            if is_url(self._images):
                return self._downloads.read(self._images.rstrip("/") + "/" + name)
            with open(os.path.join(self._images, name), "rb") as file:
                return file.read()
        except OSError as error:
            if not isinstance(error, NO_IMAGE) and error.errno != errno.ENAMETOOLONG:
                raise  # a disk or a connection fails
            raise BrokenSample(self.locate(number)[0], raw.key, f"no image {shown!r} in {self._images}") from error

    def _row(self, number: int) -> tuple[dict[str, Any], int]:
        """The row, parsed, and the number of its line (from 1) or item (from 0)."""
        self.place(number)
        start, stop, line = self._lines[number].tolist()
        try:
            row = json.loads(self._rows[start:stop])
        except (ValueError, RecursionError) as error:
            raise BrokenSample(self.locate(number)[0], f"line {line}", f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BrokenSample(self.locate(number)[0], f"line {line}", f"a {type(row).__name__}, not an object")
        return row, line


def row_shards(stem: str, rows: int) -> tuple[Shard, ...]:
    """One shard, or several of a long file: ranks that embed share them, and a killed run loses one at most."""
    if rows <= ROWS_PER_SHARD:
        return (Shard(stem, rows, 0),)
    starts = range(0, rows, ROWS_PER_SHARD)
    return tuple(Shard(f"{stem}-{i:05}", min(ROWS_PER_SHARD, rows - start), start) for i, start in enumerate(starts))


def first_answer(row: dict[str, Any]) -> str:
    """The first answer of a LLaVA conversation, ``<image>`` marks stripped; "" if there is none."""
    for turn in row["conversations"]:
        if turn["from"] == "gpt":
            return turn["value"].replace("<image>", "").strip()
    return ""


def _jsonl_rows(path: Path) -> tuple[np.ndarray, bytes | mmap.mmap]:
    """(start, stop, line number from 1) of each line that isn't blank, and the file, mapped."""
    spans, start = array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                spans.extend((start, start + len(line), number))
            start += len(line)
        rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else b""
    return np.array(spans, dtype=np.int64).reshape(-1, 3), rows


def _llava_rows(path: Path) -> tuple[np.ndarray, bytes]:
    """(start, stop, item number from 0) of each item with an image, and the items as JSON, one after another.

    Items of text alone hold no image-caption pair.
    """
    try:
        items = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); a file of one object a line is named .jsonl") from error
    if not isinstance(items, list):
        raise ValueError(f"{path} holds a {type(items).__name__}; LLaVA's format is a list of conversations")
    spans, rows = array("q"), bytearray()
    for number, item in enumerate(items):
        if not isinstance(item, dict) or item.get("image"):
            row = json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass")
            spans.extend((len(rows), len(rows) + len(row), number))
            rows += row
    return np.array(spans, dtype=np.int64).reshape(-1, 3), bytes(rows)
