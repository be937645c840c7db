"""Pictures and their captions as people have them: a folder, or a table. What ``llm2clip data
make`` makes tars of."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import stat
import tokenize
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llm2clip_plugin.data.samples import parallel
from llm2clip_plugin.data.tables import PICTURES, Table
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import parse_json
from llm2clip_plugin.outside import MAX_IMAGE, read_regular, refuse_encoding

COLUMNS = (
    "image",
    "file_name",
    "filename",
    "file",
    "path",
    "filepath",
    "image_path",
    "image_file",
)
MAX_TEXT = 16_000_000  # bytes of a picture's .txt or .json
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")
LINK = (
    "link out of the folder: copy what it leads to, or give the folder that holds that"
)


@dataclass
class Item:
    """A picture that may become a sample."""

    name: str  # path as the table has it, or relative to the folder
    path: Path
    # {"text", "kind", "language"}
    captions: list[dict[str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)  # other columns
    problem: str = ""  # why it is left out

    @property
    def key(self) -> str:
        """Name in a tar: WebDataset splits it at the first dot."""
        parts = [
            part
            for part in PurePosixPath(self.name).with_suffix("").parts
            if part not in ("/", "..")
        ]
        return "/".join(parts).replace(".", "_")

    def add_captions(self, captions: Iterable[dict[str, str]]) -> int:
        """Add those that it does not have; how many."""
        new = [caption for caption in captions if caption not in self.captions]
        self.captions += new
        return len(new)


def in_folder(folder: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Name of each picture, and the fields in the .json and .txt of the same name, or why it is
    left out."""
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_caption = path.suffix.lower() in (".txt", ".json")
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder or is_caption or HIDDEN.search(name):
            continue
        if not is_inside(path, inside):
            yield name, LINK
        elif path.is_dir():
            continue  # its pictures are those of a folder that is read anyway
        elif path.suffix.lower() not in PICTURES:
            yield name, "not a picture"
        else:
            yield name, _captions_next_to(path, inside)


def _captions_next_to(picture: Path, inside: Path) -> dict[str, Any] | str:
    row: dict[str, Any] = {}
    for suffix in (".json", ".txt"):
        path = picture.with_suffix(suffix)
        if not os.path.lexists(path):
            path = picture.with_suffix(suffix.upper())
        if not os.path.lexists(path):
            continue
        if not is_inside(path, inside):
            return f"unreadable caption: {path.name} is a {LINK}"
        try:
            data = read_regular(path, MAX_TEXT)
            refuse_encoding(path.name, data, is_whole=True)
            row |= (
                {"txt": data.decode("utf-8-sig")} if suffix == ".txt" else _object(data)
            )
        except (ValueError, OSError) as error:
            where = "" if path.name in str(error) else f"{path.name}: "
            return f"unreadable caption: {where}{error}"
    return row


def _object(data: bytes) -> dict[str, Any]:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"contains a {type(value).__name__}, expected an object")
    return value


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into ``folder``, which is resolved, whatever links it goes over."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a circle of links
        return False


def in_table(
    path: Path,
    folder: Path,
    captions: set[str],
    image_field: str,
    *,
    needs_captions: bool,
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Name of the picture, and the other columns, of each row, or why it is left out. ``captions``:
    columns that may hold some, ``needs_captions``: one of them must be there. Raises ContractError
    for a damaged table."""
    table = Table(path)
    inside = folder.resolve()
    columns = f"columns: {', '.join(table.columns)}"
    column = image_field or next(
        (name for name in COLUMNS if name in table.columns), ""
    )
    if not column:
        names = ", ".join(COLUMNS)
        raise ContractError(
            f"{path} has no image column ({names}); choose one with --image-field; {columns}"
        )
    if column not in table.columns:
        raise ContractError(
            f"{path} has no column {column!r} (--image-field); {columns}"
        )
    if needs_captions and not captions.intersection(table.columns):
        wanted = ", ".join(sorted(captions))
        problem = f"{path} has no caption column ({wanted})"
        raise ContractError(f"{problem}; set --fields NAME=short; {columns}")
    for row in table:
        name = row.cells.pop(column).strip().replace("\\", "/")
        if "://" in name:
            yield name, "URL: download the pictures first, for example with img2dataset"
            continue
        name = as_spelled(folder, name)
        if is_inside(folder / name, inside):
            cells: dict[str, Any] = dict(row.cells)
            for caption_column in captions.intersection(cells):
                cells[caption_column] = listed_texts(cells[caption_column])
            yield name, cells
        else:
            problem = (
                "outside of the image folder: set --image-folder to a folder that holds it, "
                f"not {folder}"
            )
            yield name, problem


def as_spelled(folder: Path, name: str) -> str:
    """The name as its file has it, which may be another Unicode form: macOS writes an é as two
    characters, tables have one."""
    if name.isascii() or (folder / name).exists():
        return name
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if (folder / other).exists():
            return other
    return name


def listed_texts(cell: str) -> str | list[str]:
    """The texts of a cell that lists them, as JSON, or as pandas writes lists and NumPy's arrays;
    another cell as it is.

    >>> listed_texts('["a cat", "a dog"]') == listed_texts("['a cat' 'a dog']")
    True
    """
    stripped = cell.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return cell
    with suppress(ValueError, RecursionError):
        texts = json.loads(stripped)
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    texts = []
    try:
        # not ast alone: Python joins 'a' 'b', which are two texts of an array
        for token in tokenize.generate_tokens(io.StringIO(stripped).readline):
            if token.type == tokenize.STRING:
                texts.append(ast.literal_eval(token.string))
            elif token.string.strip() not in ("[", "]", ",", ""):
                return cell
    except (ValueError, SyntaxError, tokenize.TokenError):
        return cell
    return texts if all(isinstance(text, str) for text in texts) else cell


def words_of_name(name: str) -> str:
    """Words of a file's name without numbers, or of its folder's if none are left.

    >>> words_of_name("animals/red-fox_2.jpg"), words_of_name("red fox/0017.jpg")
    ('red fox', 'red fox')
    """
    path = PurePosixPath(name)
    for text in (path.stem, path.parent.name):
        if words := " ".join(
            re.sub(r"[\W_]+|(?<![^\W_])\d+(?![^\W_])", " ", text).split()
        ):
            return words
    return ""


def join_copies(items: list[Item], processes: int) -> int:
    """Give the captions of exact copies to the first of the same pictures, and leave the copies
    out; returns how many captions were added. Only files of equal size are read."""
    of_size: dict[int, list[Item]] = {}
    for item in items:
        if not item.problem and (size := regular_size(item.path)) is not None:
            of_size.setdefault(size, []).append(item)
    alike: list[Item] = []
    for group in of_size.values():
        if len(group) > 1:
            alike += group
    hashes = parallel(_sha256, alike, processes=min(processes, len(alike) // 64))
    first_of: dict[str, Item] = {}
    joined = 0
    for item, sha256 in zip(alike, hashes, strict=True):
        if sha256 is None:
            continue
        first = first_of.setdefault(sha256, item)
        if first is item:
            continue
        added = first.add_captions(item.captions)
        first.meta = item.meta | first.meta
        item.problem = f"copy: of {first.name}, which got {added} of its captions"
        joined += added
    return joined


def regular_size(path: Path) -> int | None:
    """Bytes of a regular file; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _sha256(item: Item) -> str | None:
    """Of a picture's file; None if it cannot be read, which is said when it is decoded."""
    try:
        return hashlib.sha256(read_regular(item.path, MAX_IMAGE)).hexdigest()
    except (OSError, ValueError):
        return None
