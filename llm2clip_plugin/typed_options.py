"""A command line read into a dataclass by tyro; what it refuses is a ValueError of one line, as every other error."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def parse_typed(form: type[Settings], words: Sequence[str], **options: Any) -> Settings:
    """``tyro.cli(form, args=words, **options)``.

    Raises ValueError for what the command line or a ``__post_init__`` refuses, with its message, SystemExit after
    --help, ModuleNotFoundError without tyro, which the train extra installs.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), _wide_terminal(words):
            settings = tyro.cli(form, args=list(words), **options)
    except SystemExit as ended:
        if not ended.code:
            raise
        message = _message(ended, box.getvalue(), str(options.get("prog", "")))
    else:
        sys.stderr.write(box.getvalue())  # its warnings
        return settings
    raise ValueError(message)


@contextlib.contextmanager
def _wide_terminal(words: Sequence[str]) -> Iterator[None]:
    """A terminal that wraps no message, at hyphens of options for example; help keeps its own width."""
    before = os.environ.get("COLUMNS")
    if not any(word.startswith(("-h", "--help")) for word in words):
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _message(ended: SystemExit, box: str, command: str) -> str:
    """The message of the ValueError that tyro framed, with its line breaks, or the text of the frame."""
    paragraphs = _unframed(box)
    text = paragraphs[0] if paragraphs else "the options are refused"
    if not text.startswith("Error parsing --"):  # that is a value of another type: the option is named in the frame
        error: BaseException | None = ended
        while (error := error.__context__) is not None:
            if isinstance(error, ValueError) and error.args:
                return str(error)
    text = text.removeprefix("Error parsing ").rstrip(".")
    text = text[:1].lower() + text[1:]
    nearest = next((p for p in paragraphs if p.startswith("Perhaps you meant")), "")
    if options := list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*", nearest))):
        return f"{text}; did you mean {options[0]}?"
    return f"{text}; see {command} --help"


def _unframed(box: str) -> list[str]:
    """The paragraphs of a framed message, without its title, each on one line.

    tyro draws the frame in ASCII where stdout is not UTF-8, and colors the text where stdout is a terminal.
    """
    rows = [row.strip(" │") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    rows = ["" if row.startswith(("╭", "╰")) or set(row) <= set("─-") else row for row in rows]
    paragraphs = [" ".join(part.split()) for part in "\n".join(rows).split("\n\n")]
    return [part for part in paragraphs[0 if "╭" in box else 1 :] if part]
