"""Sources that are one file of rows, with the images in a folder or at a URL: JSON Lines, and
LLaVA's JSON."""

from __future__ import annotations

import errno
import json
import os
import shlex
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from llm2clip_plugin.data.index import IndexFile, ShardRows, Shards, Table, open_index
from llm2clip_plugin.data.remote import (
    RetryingFile,
    SideFolder,
    has_suffix,
    is_url,
    public_name,
    retried,
    stamp_of,
)
from llm2clip_plugin.data.samples import BrokenSample, Sample, well_formed
from llm2clip_plugin.data.sources import (
    Source,
    SourceConfig,
    SourceFormat,
    parse_object,
    shards_of,
)
from llm2clip_plugin.json_files import parse_json
from llm2clip_plugin.outside import MAX_IMAGE, read_regular, refuse_encoding

MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# ranks embed shards in parallel, and a killed run loses one at most
ROWS_PER_SHARD = 16384
# start and size in the file, number for messages, start and size in the index's own text
COLUMNS = 5
# number for messages, start and size in the file, or 0 and the row as JSON
Row = tuple[int, int, int, bytes]
Rows = Iterable[Row]


class RowSource(Source):
    """A row is a sample: an object whose fields name the image, the key and the captions.
    Where each row is in the file is kept in an index, and nothing of the file stays in memory."""

    # of ``read_rows``, to be raised when it changes; 0: the file is read at every start
    rows_version = 0

    def __init__(
        self,
        config: SourceConfig,
        opened: tuple[Path, SideFolder, IndexFile] | None = None,
    ) -> None:
        self._downloads = config.downloads
        # a path or a URL
        place = config.path
        if is_url(place):
            place = place.partition("?")[0]
        self.images_folder = config.images or place.rpartition("/")[0] or "."
        self._opened = opened or self._open_rows(config)
        path, self.side_folder, self._index = self._opened
        self._file = RetryingFile(path)
        if not is_url(self.images_folder) and not os.path.isdir(self.images_folder):
            advice = f"--image-folder must be that of {config.path}"
            raise FileNotFoundError(
                f"image folder {self.images_folder} does not exist; {advice}"
            )
        table = self._index.table
        super().__init__(config, shards_of(table.names, table.samples))
        self.stamps = table.stamps

    def __reduce__(self) -> tuple[type[RowSource], tuple[object, ...]]:
        return type(self), (self.config, self._opened)

    def _open_rows(self, config: SourceConfig) -> tuple[Path, SideFolder, IndexFile]:
        path = Path(config.path)
        if is_url(config.path):
            path = self._downloads.fetch(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        stamp = stamp_of(path)
        stem = public_name(config.path).rpartition(".")[0]
        folder = SideFolder.of(str(path.parent), self._downloads.folder)

        def is_current(table: Table) -> bool:
            return self.rows_version > 0 and set(table.stamps) == {stamp}

        def build(old: IndexFile | None) -> Shards:
            return _shards(self.read_rows(path), stem, stamp)

        try:
            index = open_index(
                folder,
                f"{path.name}-{self.rows_version}.index",
                COLUMNS,
                is_current=is_current,
                build=build,
                doing=f"index {config.path}",
            )
            if not index.table.names:
                raise ValueError(f"{config.path} contains no samples")
        except ValueError:
            if is_url(config.path):
                # the next start downloads it again
                self._downloads.local_path(config.path).unlink(missing_ok=True)
            raise
        return path, folder, index

    @property
    def downloads_pictures(self) -> bool:
        return is_url(self.images_folder)

    @abstractmethod
    def read_rows(self, path: Path) -> Rows:
        """The rows of a file; ``pack_rows`` makes them from any objects."""

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """What captions are read from; KeyError, TypeError or AttributeError without it."""
        return row

    def files(self) -> dict[str, str]:
        files = {self.name: self.path}
        for number in range(len(self)):
            with suppress(BrokenSample):
                row = parse_object(self.row(number)[1], "", "")
                picture = row.get(self.config.image_field)
                if is_inside(picture):
                    files[picture] = f"{self.images_folder.rstrip('/')}/{picture}"
        return files

    def row(self, number: int) -> tuple[int, bytes]:
        """A sample's number for messages, and its JSON as it is stored."""
        (start, size, line, _, _), text = self._index.row(*self.place(number))
        return line, text or self._file.read(size, start)

    def record(self, number: int) -> Sample:
        shard, _ = self.locate(number)
        line, data = self.row(number)
        row = parse_object(data, shard, f"line {line}")
        key = row.get(self.config.key_field)
        picture = row.get(self.config.image_field)
        if key in (None, ""):
            key = picture or f"line {line}"
        key = well_formed(str(key))
        try:
            values = self.values(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise BrokenSample(
                shard, key, f"invalid conversations: {error!r}"
            ) from error
        return Sample(key, values, row, partial(self._read_image, shard, key, picture))

    def _read_image(self, shard: str, key: str, name: Any) -> bytes:
        if not isinstance(name, str) or not name:
            reason = f"no image path in field {self.config.image_field!r}"
            raise BrokenSample(shard, key, reason)
        name_shown = name if len(name) <= 100 else name[:97] + "..."  # a data: URI, say
        if not is_inside(name):
            reason = f"image {name_shown!r} is not a path inside {self.images_folder}"
            raise BrokenSample(shard, key, reason)
        try:
            if is_url(self.images_folder):
                return self._downloads.read(self.images_folder.rstrip("/") + "/" + name)
            path = Path(self.images_folder, name)
            return retried(partial(read_regular, path, MAX_IMAGE), str(path))
        except ValueError as error:
            raise BrokenSample(shard, key, f"image {name_shown!r}: {error}") from error
        except OSError as error:
            if not isinstance(error, MISSING) and error.errno != errno.ENAMETOOLONG:
                raise  # a disk or a connection fails
            problem = "access denied to" if isinstance(error, PermissionError) else "no"
            reason = f"{problem} image {name_shown!r} in {self.images_folder} (--image-folder)"
            raise BrokenSample(shard, key, reason) from error


def is_inside(name: Any) -> TypeGuard[str]:
    """Whether the value of a row is the path of a file inside a folder."""
    if not isinstance(name, str) or not name:
        return False
    is_outside = os.path.isabs(name) or ".." in name.split("/")
    return not is_outside and "\0" not in name and name == well_formed(name)


def pack_rows(items: Iterable[tuple[int, Any]]) -> Rows:
    """Rows from (number for messages, object that JSON can hold)."""
    rows: list[Row] = []
    for number, row in items:
        text = json.dumps(row, ensure_ascii=False)
        rows.append((number, 0, 0, text.encode("utf-8", "surrogatepass")))
    return rows


def _parts(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows in lists of ROWS_PER_SHARD, the last one shorter."""
    while part := list(islice(rows, ROWS_PER_SHARD)):
        yield part


def _shards(rows: Rows, stem: str, stamp: tuple[int, int]) -> Iterator[ShardRows]:
    """One shard, called ``stem``, or several of a long file."""
    parts = _parts(iter(rows))
    first = list(islice(parts, 2))
    for number, part in enumerate(chain(first, parts)):
        table = []
        text = bytearray()
        for line, start, size, data in part:
            table.append((start, size, line, len(text), len(data)))
            text += data
        name = stem if len(first) == 1 else f"{stem}-{number:05}"
        yield ShardRows(name, stamp, np.array(table, dtype=np.int64), bytes(text))


class JsonlSource(RowSource):
    """The lines that aren't blank."""

    rows_version = 1

    def read_rows(self, path: Path) -> Rows:
        start = 0
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            refuse_encoding(path, head)
            first = head.strip().partition(b"\n")[0].rstrip()
            if first.startswith(b"[") or (
                first.startswith(b"{") and first.endswith(b"},")
            ):
                command = "jq -c '.[]'" if first.startswith(b"[") else "sed 's/},$/}/'"
                convert = f"{command} {shlex.quote(str(path))} > NEW.jsonl"
                raise ValueError(
                    f"{path} is a list, expected an object a line: `{convert}`"
                )
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, start, len(line), b""
                start += len(line)


class LlavaSource(RowSource):
    """LLaVA's pretraining JSON: the items with an image; text-only items are not image-caption
    pairs."""

    rows_version = 1

    def read_rows(self, path: Path) -> Rows:
        try:
            items = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); with an object a line, rename it .jsonl"
            ) from error
        if not isinstance(items, list):
            raise ValueError(
                f"{path} contains a {type(items).__name__}, expected LLaVA's list of conversations"
            )
        # conversations without an image are no samples; what is no object is refused later
        return pack_rows(
            (number, item)
            for number, item in enumerate(items)
            if not isinstance(item, dict) or item.get("image")
        )

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """With the first answer, without ``<image>`` placeholders, as "gpt"."""
        answers = (
            turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"
        )
        return {**row, "gpt": next(answers, "").replace("<image>", "").strip()}


def _format(name: str, help: str, suffix: str, source: type[RowSource]) -> SourceFormat:
    return SourceFormat(
        name=name,
        help=help,
        recognizes=lambda path: has_suffix(path, suffix),
        open=lambda config, broken_shards: source(config),
    )


SOURCE = [
    _format("jsonl", "a .jsonl file", ".jsonl", JsonlSource),
    _format("llava", "LLaVA's .json file", ".json", LlavaSource),
]
