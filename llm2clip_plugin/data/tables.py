"""Tables of pictures and captions, .csv and .tsv, read strictly: damage is an error that names the
line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.outside import printable

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DELIMITERS = ",;\t"
# characters of a field; a longer one is another file's text, or quotes that were never closed
LONGEST = 131_072
SHOWN = 60  # characters of a line in an error
NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}


@dataclass(frozen=True)
class Row:
    """A row, by the names of its columns; ``line``: the number of its first line."""

    line: int
    cells: dict[str, str]


class Table:
    """A table with a header. Iterating reads it. ContractError names the file and the line of what
    is wrong."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ContractError for an empty table, or a name that two columns
        have."""
        self.path = path
        with self._opened() as lines:
            head = next(lines, "")
        if not head.strip():
            raise ContractError(
                f"{path} is empty; expected a header, such as image,caption, and a row a picture"
            )
        self._delimiter = max(DELIMITERS, key=head.count)
        _, names = next(self._read())
        self._names = [name.strip() for name in names]
        self.columns = [name for name in self._names if name]
        for name in self.columns:
            if self.columns.count(name) > 1:
                numbers = [
                    str(number)
                    for number, other in enumerate(self._names, 1)
                    if other == name
                ]
                advice = f"rename one, and choose captions with --fields {name}=short NAME=short"
                raise ContractError(
                    f"{path} has {name!r} as columns {' and '.join(numbers)}; {advice}"
                )

    def __iter__(self) -> Iterator[Row]:
        rows = self._read()
        next(rows)
        for line, cells in rows:
            yield Row(line, self._named(line, cells))

    def _named(self, line: int, cells: list[str]) -> dict[str, str]:
        expected = len(self._names)
        has_surplus = any(cell.strip() for cell in cells[expected:])
        if len(cells) < expected or has_surplus:
            fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
            problem = f"{fields}, expected {expected} ({', '.join(self._names)})"
            separator = NAMES[self._delimiter]
            raise self._error(
                line,
                problem,
                f'put a text with a {separator} into quotes: "a red, round thing"',
            )
        named = dict(zip(self._names, cells, strict=False))
        if named.pop("", "").strip():
            raise self._error(
                line,
                "a value in a column without a name",
                "name the column in the header",
            )
        for name, cell in named.items():
            if len(cell) > LONGEST:
                problem = (
                    f"field {name!r} has {len(cell):,} characters, at "
                    f"most {LONGEST:,} are read"
                )
                raise self._error(
                    line, problem, "shorten it, or close its quote where it should end"
                )
        return named

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        """Number of the first line, and cells, of every row that isn't blank."""
        kept: list[str] = []  # the lines of the row that is being read

        def remembered(lines: Iterator[str]) -> Iterator[str]:
            for line in lines:
                kept.append(line)
                yield line

        csv.field_size_limit(2**31 - 1)  # its own limit would hide an unclosed quote
        with self._opened() as lines:
            reader = csv.reader(
                remembered(lines), delimiter=self._delimiter, strict=True
            )
            while True:
                start = reader.line_num + 1
                kept.clear()
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    raise self._damage(start, reader.line_num, error) from error
                if cells is None:
                    return
                self._refuse_swallowed_rows(start, kept, len(cells))
                if any(cell.strip() for cell in cells):
                    yield start, cells

    def _damage(self, start: int, line: int, error: csv.Error) -> ContractError:
        if "unexpected end of data" in str(error):
            return self._error(
                start,
                "a quote is opened and never closed",
                "close it, or write a literal one as two",
            )
        if "expected after" in str(error):
            problem = "text after a closing quote"
            if line > start:
                problem += f", in a quoted field of the row that begins in line {start}"
            return self._error(line, problem, 'write a quote inside of quotes as ""')
        return self._error(line, str(error), "correct the line")

    def _refuse_swallowed_rows(
        self, start: int, lines: Sequence[str], expected: int
    ) -> None:
        """Raise ContractError for a quoted field over a line that looks like a row: as many fields,
        a picture."""
        for number, line in enumerate(lines[1:], start + 1):
            cells = [
                cell.strip(' "\r\n').lower() for cell in line.split(self._delimiter)
            ]
            if len(cells) == expected and any(
                cell.endswith(PICTURES) for cell in cells
            ):
                excerpt = printable(line.strip()[:SHOWN])
                problem = (
                    f"a quoted field goes on over line {number}, which "
                    f"looks like a row: {excerpt}"
                )
                raise self._error(start, problem, "close the quote where the text ends")

    def _error(self, line: int, problem: str, advice: str) -> ContractError:
        return ContractError(f"{self.path}, line {line}: {problem}; {advice}")

    @contextmanager
    def _opened(self) -> Iterator[Iterator[str]]:
        """The lines, with their ends."""
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                yield self._without_nul(file)
        except UnicodeDecodeError as error:
            raise self._not_utf8() from error

    def _without_nul(self, lines: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            if "\0" in line:
                advice = (
                    "if it is UTF-16: iconv -f utf16 -t utf8 "
                    f"{self.path} > NEW{self.path.suffix}"
                )
                raise self._error(number, "a NUL byte", advice)
            yield line

    def _not_utf8(self) -> ContractError:
        """The first line that is not UTF-8, and how to convert the file."""
        number = 0
        line = b""
        with open(self.path, "rb") as file:
            is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
            file.seek(0)
            for line in file:
                number += 1
                if not is_utf8(line):
                    break
        name = "latin1"
        guess = f"Latin-1: {printable(line.decode('latin-1').strip()[:SHOWN])}"
        if is_utf16:
            name = "utf16"
            guess = "UTF-16"
        advice = (
            f"convert it: iconv -f {name} -t utf8 {self.path} > NEW{self.path.suffix}"
        )
        return self._error(number, f"not UTF-8, perhaps {guess}", advice)


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
