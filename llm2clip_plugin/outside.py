"""What comes from outside is checked before it is used: texts, files that may be pipes, encodings,
the sizes of images. Standard library only.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    """A text from outside with control characters, which a terminal would obey, as escapes."""
    return "".join(
        letter if letter.isprintable() else repr(letter)[1:-1] for letter in text
    )


def printable_lines(text: str) -> str:
    """As ``printable``, but line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


# a URL up to its query, and the query: its last character is not the punctuation of a sentence
URL_WITH_QUERY = re.compile(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*[^\s'\",;:.)]")


def without_queries(text: str) -> str:
    """A text whose URLs end where their queries begin: these may hold keys, which are not printed.

    >>> without_queries("no file at https://host/0.tar?token=KEY (HTTP 404)")
    'no file at https://host/0.tar (HTTP 404)'
    """
    return URL_WITH_QUERY.sub(r"\1", text)


def expand_home(value: Any) -> Any:
    """A path that begins with ~/ with the home folder, and those in lists and objects of JSON;
    other values as they are."""
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    if isinstance(value, dict):
        return {name: expand_home(item) for name, item in value.items()}
    return value


def expand_home_in_word(word: str) -> str:
    """A word of the command line as ``expand_home``, also --output=~/runs: shells leave a ~ as it
    is after = and in quotes."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={expand_home(value)}"
    return expand_home(word)


MAX_IMAGE = 1_000_000_000  # bytes of an image file


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file. Raises ValueError for a pipe or a device, which may never end, and for
    more than ``most`` bytes; OSError."""
    # a pipe without a writer would block
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file, but a pipe or a device")
        if status.st_size > most:
            raise ValueError(f"{status.st_size:,} bytes, expected at most {most:,}")
        return file.read()


def refuse_encoding(
    path: str | os.PathLike[str], start: bytes, *, is_whole: bool = False
) -> None:
    """Raise ValueError unless the beginning of a text file is UTF-8; unless it is whole, a
    character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, is_whole)
    except UnicodeDecodeError as error:
        byte = f"byte {start[error.start]:#04x} at offset {error.start}"
        is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "UTF-16" if is_utf16 else "LATIN1"
        new = f"NEW{Path(path).suffix}"
        advice = f"convert it, for example iconv -f {encoding} -t UTF-8 {path} > {new}"
        raise ValueError(f"{path} is not UTF-8: {byte}; {advice}") from error


# of an image; where PIL begins to warn of decompression bombs, 268 MB as RGB
MAX_PIXELS = 89_478_485
# longer to shorter side; with its shorter side at 448 pixels such an image has 154 MB
MAX_ASPECT = 256


def check_image_size(width: int, height: int) -> None:
    """Raise ValueError for more than MAX_PIXELS or MAX_ASPECT."""
    longer = max(width, height)
    shorter = min(width, height)
    if width * height > MAX_PIXELS or longer > MAX_ASPECT * shorter:
        limits = f"{MAX_PIXELS:,} pixels and sides in a ratio of {MAX_ASPECT}"
        raise ValueError(
            f"the image has {width} x {height} pixels; the limits are {limits}; crop or resize it"
        )
