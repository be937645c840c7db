"""Runs a page of docs/ as printed: its ``bash`` blocks in order, and looks for the lines of its
``text`` blocks.

Only standard libraries: also imported in LLaVA's environment. Blocks of other languages (``sh``,
``json``) don't run.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """Commands of a page and what it says that they print."""

    heading: str  # the nearest second-level heading above it
    commands: tuple[str, ...]  # a line each, continuation lines joined
    printed: str


def blocks(path: Path) -> Iterator[Block]:
    """The ``bash`` blocks in the page's order, each with the ``text`` blocks that follow it."""
    heading = ""
    commands = ()
    printed = ""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(
        r"^## (?P<heading>[^\n]+)$|^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
        text,
        re.M | re.S,
    ):
        if match["kind"] == "text":
            printed += match["body"]
        elif match["kind"] == "bash" or match["heading"]:
            if commands:
                yield Block(heading, commands, printed)
            heading = match["heading"] or heading
            joined = re.sub(r"\s*\\\n\s*", " ", match["body"] or "")
            lines = (line.strip() for line in joined.splitlines())
            commands = tuple(
                line for line in lines if line and not line.startswith("#")
            )
            printed = ""
    if commands:
        yield Block(heading, commands, printed)


def masked(line: str) -> str:
    """The line without what differs from run to run: numbers, hashes, spaces."""
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{6,}\b", "#", line)
    line = re.sub(r"[-+]?\d[\d.,:]*(e[-+]?\d+)?", "#", line)
    return " ".join(line.split())


def missing(printed: str, output: str) -> list[str]:
    """Lines that the page prints and the command did not; ``...`` stands for any lines or the rest
    of one."""
    there = [masked(line) for line in re.split(r"[\n\r]", output)]
    lost = []
    for line in printed.splitlines():
        wanted, cut, _ = masked(line).partition("...")
        is_printed = any(
            text.startswith(wanted.rstrip()) if cut else text == wanted
            for text in there
        )
        if wanted.strip() and not is_printed:
            lost.append(line)
    return lost


def run_block(block: Block, run: Callable[[str], tuple[int | None, str]]) -> str:
    """Run its commands; fails with a command's output, or with the lines that the page promises and
    nobody printed."""
    output = ""
    for command in block.commands:
        status, printed = run(command)
        assert status == 0, f"{command}\n{printed}"
        output += printed
    assert (lost := missing(block.printed, output)) == [], (
        f"{block.commands} did not print {lost}, but:\n{output}"
    )
    return output
