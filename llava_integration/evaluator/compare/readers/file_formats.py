"""What logs are stored in: tables, JSONL (also packed by gzip) and arrays in JSON."""

import codecs
import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from llava_integration.evaluator.benchmarks.answers import json_lines
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.json_files import read_json_value

csv.field_size_limit(2**24)

TABLES = (".csv", ".tsv")
EXCEL = ".xlsx"
JSON_TABLES = (".json", ".jsonl")
FIRST_ROWS = 100  # of a table, that tell its columns


def ending_of(path: Path) -> str:
    """The ending that tells a file's format; Windows and Excel may write it in capitals."""
    return path.suffix.lower()


def table(
    path: Path, *, errors: str = "strict", formulas: bool = True
) -> Iterator[tuple[str, list[Any]]]:
    """(where, cells) of a table's rows, the names of its columns first: CSV, TSV, JSONL, JSON or
    Excel. ``formulas``: as ``excel_rows``."""
    if ending_of(path) == EXCEL:
        yield from excel_rows(path, formulas=formulas)
    elif ending_of(path) in JSON_TABLES:
        rows = list(json_rows(path))
        # a row need not have every column
        names = list(dict.fromkeys(name for _, row in rows for name in row))
        if rows:
            first_place, _ = rows[0]
            yield first_place, names
        for where, row in rows:
            yield where, [row.get(name) for name in names]
    else:
        with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
            lines = csv.reader(
                file, delimiter="\t" if ending_of(path) == ".tsv" else ","
            )
            yield from (
                (f"{path}, line {lines.line_num}", line) for line in lines if line
            )


MOST_UNPACKED = 2**29  # bytes of a packed file, which would fill the memory


def too_large(path: Path, unpacked: str, *, fix: str) -> ContractError:
    """The error for a file that unpacks to more than MOST_UNPACKED."""
    return ContractError(
        f"{path} unpacks to {unpacked} bytes, expected at most {MOST_UNPACKED:,}; {fix}"
    )


def open_workbook(path: Path, *, formulas: bool) -> Any:
    """openpyxl's workbook. Raises ContractError for a file that unpacks to more than
    MOST_UNPACKED."""
    from openpyxl import load_workbook

    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MOST_UNPACKED:
        raise too_large(path, f"{unpacked:,}", fix="save the table as .tsv")
    return load_workbook(path, read_only=True, data_only=not formulas)


def excel_rows(path: Path, *, formulas: bool) -> Iterator[tuple[str, list[Any]]]:
    """(where, cells) of the rows in the first sheet, but for empty ones; each has a cell for every
    column of the first. Raises as ``open_workbook``.

    ``formulas``: cells that begin with "=" are texts, such as a model's answer, not the values that
    Excel computed.
    """
    sheet = open_workbook(path, formulas=formulas).worksheets[0]
    sheet.reset_dimensions()  # what the file says of them may be wrong
    width = 0
    for line, row in enumerate(sheet.iter_rows(values_only=True), 1):
        cells = list(row)
        while cells and cells[-1] is None:  # formatted, but empty
            cells.pop()
        if cells:
            cells += [None] * (width - len(cells))
            width = width or len(cells)
            yield f"{path}, line {line}", cells


def unread_sheets(path: Path) -> list[str]:
    """The names of an Excel file's sheets after the first, which alone is read; not of empty
    ones."""
    names = []
    for sheet in open_workbook(path, formulas=True).worksheets[1:]:
        if any(filled(row) for row in sheet.iter_rows(values_only=True)):
            names.append(sheet.title)
    return names


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL file, or of a JSON file with an array of rows."""
    if ending_of(path) == ".jsonl":
        yield from json_lines(path)
        return
    for number, row in enumerate(read_json_value(path), 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ContractError(f"{where}: expected an object, got {row!r:.60}")
        yield where, row


def columns(path: Path) -> list[str]:
    """The names of a table's columns, of a JSON table those of its first rows, none of which need
    have all; those before a row that can't be read. None of a .json that is no array."""
    names: dict[str, None] = {}
    with suppress(ContractError), errors_about(path):
        if ending_of(path) == ".jsonl":
            for _, row in islice(json_rows(path), FIRST_ROWS):
                names.update(dict.fromkeys(str(name) for name in row))
        elif ending_of(path) == ".json":
            if is_array(path):
                names.update(dict.fromkeys(first_object(path)))
        else:
            _, header = next(table(path, errors="replace"), ("", []))
            names.update(dict.fromkeys(str(name) for name in header))
    return list(names)


def is_array(path: Path) -> bool:
    """Whether a JSON file begins as an array does."""
    with open_text(path) as file:
        return file.read(100).lstrip().startswith("[")


HEAD = 1 << 20  # characters of a JSON array in which its first object ends


def first_object(path: Path) -> dict[str, Any]:
    """The first object of a JSONL file, or of a file with an array of objects; empty if it is
    neither."""
    with open_text(path) as file:
        head = file.read(HEAD)
    if head.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value, _ = json.JSONDecoder().raw_decode(head.lstrip()[1:].lstrip())
            return value if isinstance(value, dict) else {}
        return {}
    try:
        return next((value for _, value in islice(json_objects(path), 1)), {})
    except ContractError:
        return {}


class Unpacked(io.RawIOBase):
    """What gzip packed, up to MOST_UNPACKED bytes; reading more raises ContractError."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = gzip.open(path)
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._bytes += len(data)
        if self._bytes > MOST_UNPACKED:
            more = f"more than {MOST_UNPACKED:,}"
            raise too_large(self._path, more, fix="unpack it first (gunzip)")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(path: Path) -> IO[str]:
    """A text file, or one that gzip packed."""
    if ending_of(path) == ".gz":
        unpacked = io.BufferedReader(Unpacked(path), HEAD)
        return io.TextIOWrapper(unpacked, encoding="utf-8-sig", errors="replace")
    return path.open(encoding="utf-8-sig", errors="replace")


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a JSONL file, also of a packed one, or of an array of objects. Raises
    ContractError that names the line or the sample."""
    in_array = is_array(path)
    if not in_array and ending_of(path) != ".gz":
        yield from json_lines(path)
        return
    with errors_about(path, fix="was the run cut off?"), open_text(path) as file:
        if in_array:
            values = json.load(file)
        else:
            values = (json.loads(line) for line in file if line.strip())
        for number, value in enumerate(values, 1):
            where = f"{path}, sample {number}"
            if not isinstance(value, dict):
                raise ContractError(
                    f"{where}: expected a JSON object, got {str(value)[:60]!r}"
                )
            yield where, value


def title_problem(path: Path) -> str:
    """Why the first row of a table is no header, if it has one cell and the second more: a title.
    "" otherwise."""
    rows = []
    with suppress(ContractError, OSError), errors_about(path):
        rows = list(islice(table(path, errors="replace"), 2))
    if len(rows) < 2:
        return ""
    where, cells = rows[0]
    title = filled(cells)
    names = filled(rows[1][1])
    if len(title) != 1 or len(names) < 2:
        return ""
    header = ", ".join(names)
    return (
        f"{where} was taken for the header, but has one cell ({title[0]:.60}), expected the names "
        f"of the columns, such as ({header:.100}) below it; delete what is above the header"
    )


def filled(cells: Sequence[Any]) -> list[str]:
    """The cells that are not empty, as texts."""
    return [str(cell) for cell in cells if cell is not None and str(cell).strip()]


def table_problem(path: Path) -> str:
    """Why a file is no table, as far as its first bytes and rows tell; "" if they do not."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return f"{path} is empty"
    if ending_of(path) == EXCEL:
        try:
            with errors_about(path, fix="expected an Excel file; save it again"):
                next(table(path), None)
        except ContractError as error:
            return str(error)
        return title_problem(path)
    if ending_of(path) not in TABLES:
        return ""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{path} is in UTF-16; save it in UTF-8"
    if problem := title_problem(path):
        return problem
    first_line = head.splitlines()[0]
    expected, name = (b",", "commas") if ending_of(path) == ".csv" else (b"\t", "tabs")
    if expected in first_line:
        return ""
    for separator, plural in ((b";", "semicolons"), (b"\t", "tabs"), (b",", "commas")):
        if separator in first_line:
            return f"{path} has {plural} between its columns; a {ending_of(path)} has {name}"
    return ""
