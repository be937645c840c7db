"""Damage to files, drawn from a fixed seed: flipped bytes, cuts, changed and missing fields; and
what may come of it.

A case damages one file of a format and loads it as a command does. Allowed are the result of the
intact files, or a ValueError or OSError, which the command line prints as one ``error:`` line.
Anything else is a silent difference, a traceback, or a hang.
"""

import copy
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 30  # that a case may take
VALUES = [None, True, 0, -1, 1, 10**9, 1 << 70, 0.5, math.nan, math.inf]
VALUES += ["", "x", "../../x", "\x1b[2J", [], {}, [1], {"a": 1}]


@dataclass(frozen=True)
class Format:
    """Files that a command reads."""

    name: str
    make: Callable[[Path], object]  # writes the files into an empty folder
    # reads them as a command does; returns what can be compared
    load: Callable[[Path], Any]
    files: tuple[str, ...] = ("**/*",)  # patterns of the files that are damaged
    without: tuple[str, ...] = ()  # names that are not: for people
    free_text: bool = False  # without a checksum: only errors are judged


def run_cases(form: Format, folder: Path, *, cases: int) -> None:
    """Damage the files of a format ``cases`` times; raises AssertionError that describes every case
    that failed.

    Another seed than 0: ``FUZZ_SEED=1 pytest tests/faults -k fuzz``.
    """
    seed = os.environ.get("FUZZ_SEED", "0")
    intact = folder / "intact" / "x"
    damaged = folder / "damaged" / "x"
    intact.mkdir(parents=True)
    form.make(intact)
    paths: set[Path] = set()  # relative to the folder
    for pattern in form.files:
        for path in intact.glob(pattern):
            if path.is_file() and path.name not in form.without:
                paths.add(path.relative_to(intact))
    files = sorted(paths)
    assert files, f"{form.name} has no files"
    shutil.copytree(intact, damaged)
    expected = form.load(damaged)
    failures = []
    for case in range(cases):
        draw = random.Random(f"{form.name} {seed} {case}")
        file = draw.choice(files)
        shutil.rmtree(damaged)
        shutil.copytree(intact, damaged)
        what = damage(damaged / file, draw)
        if problem := judge(form, damaged, expected):
            failures.append(f"case {case}, {file}, {what}: {problem}")
    assert not failures, (
        f"{len(failures)} of {cases} cases of {form.name}:\n" + "\n".join(failures)
    )


def judge(form: Format, folder: Path, expected: Any) -> str:
    """What is wrong with what comes of loading, "" if nothing."""
    try:
        with deadline():
            result = form.load(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        return "" if text.strip() else f"a {type(error).__name__} without a message"
    except HangError:
        return f"no end after {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (
        ""
        if form.free_text or result == expected
        else f"a silent difference: {result} not {expected}"
    )


class HangError(BaseException):
    """A case took too long."""


@contextmanager
def deadline() -> Iterator[None]:
    """Raise HangError in the block after SECONDS."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage(path: Path, draw: random.Random) -> str:
    """Change one file; returns what was done."""
    content = path.read_bytes()
    kinds: list[Callable[[bytes, random.Random], bytes]] = [flip, flip, cut, overwrite]
    if path.suffix in (".json", ".jsonl") or content[:1] in (b"{", b"["):
        kinds += [change_field] * 6
    if path.suffix == ".safetensors":
        kinds += [change_header] * 3
    kind = draw.choice([*kinds, extend, None])
    path.unlink()
    if kind is None:
        return "removed"
    path.write_bytes(kind(content, draw))
    return kind.__name__


def flip(content: bytes, draw: random.Random) -> bytes:
    """One bit."""
    position = draw.randrange(len(content) or 1)
    changed = (content[position] if content else 0) ^ (1 << draw.randrange(8))
    return content[:position] + bytes([changed]) + content[position + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return content[: draw.randrange(len(content) or 1)]


def extend(content: bytes, draw: random.Random) -> bytes:
    """Bytes behind the end."""
    return content + draw.randbytes(draw.randint(1, 40))


def overwrite(content: bytes, draw: random.Random) -> bytes:
    """A block of zeros, as a disk that was full leaves it, or of noise."""
    start = draw.randrange(len(content) or 1)
    length = len(content[start : start + draw.randint(1, 64)])
    block = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
    return content[:start] + block + content[start + length :]


def change_header(content: bytes, draw: random.Random) -> bytes:
    """A field in the header of a safetensors file, its length kept right."""
    length = int.from_bytes(content[:8], "little")
    header = change_field(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def change_field(content: bytes, draw: random.Random) -> bytes:
    """A JSON value, changed, exchanged, doubled or left out, in one of the lines that hold JSON."""
    if (whole := _container(content)) is not None:
        return json.dumps(change_value(whole, draw), indent=2).encode() + b"\n"
    lines = content.split(b"\n")
    bodies = {
        number: body
        for number, line in enumerate(lines)
        if (body := _container(line)) is not None
    }
    if not bodies:
        return flip(content, draw)
    number = draw.choice(sorted(bodies))
    lines[number] = json.dumps(change_value(bodies[number], draw)).encode()
    return b"\n".join(lines)


def _container(content: bytes) -> Any:
    """The JSON object or list in these bytes, else None."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, (dict, list)) else None


def change_value(body: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one change somewhere inside."""
    body = copy.deepcopy(body)
    places = list(_places(body))
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    before = holder[key]
    kind = draw.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = draw.choice(VALUES) if kind < 3 else _near(before, draw)
    return body


def _near(value: Any, draw: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + draw.choice((-1, 1))
    if isinstance(value, str) and value:
        position = draw.randrange(len(value))
        return value[:position] + chr(ord(value[position]) ^ 1) + value[position + 1 :]
    return draw.choice(VALUES)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in items:
        yield value, key
        yield from _places(part)
