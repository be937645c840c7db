"""The pictures of a folder or a table, with their captions; nothing of a picture is read yet."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llm2clip_plugin.data.make.options import MakeConfig
from llm2clip_plugin.data.sources.captions import parse_fields, read_captions
from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.options.names import nearest

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = ("image", "file_name", "filename", "file", "path", "filepath", "image_path", "image_file")


@dataclass
class Item:
    """A picture that may become a sample."""

    name: str  # path as the table has it, or relative to the folder
    path: Path
    captions: list[dict[str, str]] = field(default_factory=list)  # {"text", "kind", "language"}
    meta: dict[str, Any] = field(default_factory=dict)  # other columns
    problem: str = ""  # why it is left out

    @property
    def key(self) -> str:
        """Name in a tar: WebDataset splits it at the first dot."""
        parts = [part for part in PurePosixPath(self.name).with_suffix("").parts if part not in ("/", "..")]
        return "/".join(parts).replace(".", "_")


def list_items(config: MakeConfig) -> list[Item]:
    """Every picture of ``config.path``, in order of name or row.

    Raises ValueError if it is neither a folder nor a table, or has no pictures or captions.
    """
    path = Path(config.path)
    if path.is_dir():
        items = list(_in_folder(path, config))
        if not any(not item.problem for item in items):
            tars = any(path.rglob("*.tar"))
            hint = "it holds .tar files, which all commands read as they are" if tars else f"read: {' '.join(PICTURES)}"
            raise ValueError(f"no pictures in {path}; {hint}")
    elif path.suffix.lower() in TABLES and path.is_file():
        items = _in_table(path, config)
    else:
        raise ValueError(f"{path} is neither a folder of pictures nor a table ({' '.join(TABLES)})")
    for item in items:
        if not item.problem and not item.captions:
            if config.file_names:
                text = _from_name(item.name)
                item.captions = [{"text": text, "kind": "short", "language": config.language}] if text else []
            item.problem = "" if item.captions else "no caption"
    return items


def _in_folder(folder: Path, config: MakeConfig) -> Iterator[Item]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.suffix.lower() in (".txt", ".json") or re.search(r"(^|/)(\.|__MACOSX/)", name):
            continue
        item = Item(name, path)
        if path.suffix.lower() not in PICTURES:
            item.problem = "not a picture"
        else:
            _read_neighbors(item, config)
        yield item


def _read_neighbors(item: Item, config: MakeConfig) -> None:
    """The captions and fields in the .json and .txt of the same name."""
    values: dict[str, Any] = {}
    text, fields = item.path.with_suffix(".txt"), item.path.with_suffix(".json")
    try:
        if fields.is_file():
            values = json.loads(fields.read_text(encoding="utf-8-sig"))
        if text.is_file():
            values = {**values, "txt": text.read_text(encoding="utf-8-sig")}
        _add_captions(item, values, config)
    except (ValueError, TypeError) as error:
        item.problem = f"unreadable caption: {error}"


def _add_captions(item: Item, values: dict[str, Any], config: MakeConfig) -> None:
    fields = parse_fields(config.fields, config.language)
    captions, _ = read_captions(values, fields)
    item.captions += [new for caption in captions if (new := vars(caption)) not in item.captions]
    used = {"captions", *(one.name for one in fields)}
    item.meta = {name: value for name, value in values.items() if name not in used} | item.meta


def _in_table(path: Path, config: MakeConfig) -> list[Item]:
    """The items of a table; rows of the same image are one."""
    items: dict[str, Item] = {}
    column = config.image_field
    folder = Path(config.images or path.parent)
    captions = {one.name for one in parse_fields(config.fields, config.language)}
    for number, row in enumerate(_rows(path)):
        if number == 0:
            column = column or next((name for name in COLUMNS if name in row), "")
            if column not in row:
                near = nearest(column, row)
                raise ValueError(f"{path} has no image column {column!r}{near}; set --image-field; {_columns(row)}")
            if not captions & row.keys() and not config.file_names:
                raise ValueError(f"{path} has no caption column; set --fields NAME=short; {_columns(row)}")
            if is_url(str(row[column])):
                raise ValueError(f"{column!r} of {path} holds URLs; img2dataset downloads them as tars")
        name = str(row.pop(column, None) or "").replace("\\", "/")
        item = items.setdefault(name, Item(name, folder / name, problem="" if name else "no image path"))
        try:
            _add_captions(item, row, config)
        except ValueError as error:
            item.problem = f"unreadable caption: {error}"
    if not items:
        raise ValueError(f"{path} has no rows")
    return list(items.values())


def _columns(row: dict[str, Any]) -> str:
    return f"columns: {', '.join(map(repr, row))}"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]

        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_row(line, f"line {number} of {path}")
                return
            head = file.readline()
            file.seek(0)
            for row in csv.DictReader(file, delimiter=max(",;\t", key=head.count)):
                row.pop(None, None)  # cells beyond the last column
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}; save it as CSV UTF-8") from error


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} contains a {type(row).__name__}, expected an object")
    return row


def _from_name(name: str) -> str:
    """Words of a file's name without numbers, or of its folder's if none are left.

    >>> _from_name("animals/red-fox_2.jpg"), _from_name("red fox/0017.jpg")
    ('red fox', 'red fox')
    """
    path = PurePosixPath(name)
    for text in (path.stem, path.parent.name):
        if words := " ".join(re.sub(r"[\W_]+|(?<![^\W_])\d+(?![^\W_])", " ", text).split()):
            return words
    return ""
