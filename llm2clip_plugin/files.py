"""What comes from outside is checked before it is used: JSON files and their fields, headers,
names, the Hub's pauses; and what a run leaves for its next start. Standard library only.
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib
import json
import math
import os
import pkgutil
import random
import re
import shlex
import stat
import struct
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


Settings = TypeVar("Settings")


class ContractError(ValueError):
    """A file is damaged or does not match what its reader expects; the message names the file and
    the fix."""


def printable(text: str) -> str:
    """A text from outside with control characters, which a terminal would obey, as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def printable_lines(text: str) -> str:
    """As ``printable``, but line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def read_json_value(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises ContractError naming the file, or OSError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{path} is not valid JSON ({error})") from error


MAX_IMAGE = 1_000_000_000  # bytes of an image file


def parse_json(text: str | bytes) -> Any:
    """The value of a user's JSON text. Raises ValueError in one line, also for a text that is
    nested too deep, and for an object with a name twice, of which one value would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice; rename one")
    return values


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


def refuse_encoding(path: str | os.PathLike[str], start: bytes, *, is_whole: bool = False) -> None:
    """Raise ValueError unless the beginning of a text file is UTF-8; unless it is whole, a
    character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, is_whole)
    except UnicodeDecodeError as error:
        byte = f"byte {start[error.start]:#04x} at offset {error.start}"
        fix = f"convert it, for example iconv -f LATIN1 -t UTF-8 {path} > NEW{Path(path).suffix}"
        raise ValueError(f"{path} is not UTF-8: {byte}; {fix}") from error


@contextmanager
def errors_about(path: object, *, fix: str = "") -> Iterator[None]:
    """What a library raises about a file of ours, of any type, as a ContractError that names the
    file. OSError, ContractError, ImportError, a lack of memory and errors of a GPU pass: they name
    the file already, or a cause outside it."""
    try:
        yield
    except (OSError, ContractError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = "" if isinstance(error, ValueError) and reason else type(error).__name__
        reason = ": ".join(part for part in (kind, reason) if part)
        advice = f"; {fix}" if fix else ""
        raise ContractError(f"{path} cannot be used ({reason}){advice}") from error


def from_plain(
    kind: type[Settings], values: Any, *, where: str, default: Settings | None = None
) -> Settings:
    """A dataclass, and those in its fields, from parsed JSON; ``default`` gives the fields that
    ``values`` lacks. Raises ContractError for an unknown, missing or mistyped field, and what the
    dataclasses' own checks raise."""
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ContractError(
            f"{where} is {_short(values)}, expected an object with the fields {', '.join(known)}"
        )
    if unknown := sorted(set(values) - set(known)):
        raise ContractError(f"{where} has unknown fields {unknown}; known: {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    given = {}
    missing = []
    for name, item in known.items():
        usual = getattr(default, name) if default is not None else default_of(item)
        if name in values:
            given[name] = typed(hints[name], values[name], f"{where}: {name}", usual)
        elif usual is not dataclasses.MISSING:
            given[name] = usual
        elif dataclasses.is_dataclass(hints[name]):
            given[name] = from_plain(hints[name], {}, where=f"{where}: {name}")
        else:
            missing.append(name)
    if missing:
        raise ContractError(f"{where} is missing the required fields {missing}")
    return kind(**given)


def default_of(item: dataclasses.Field) -> Any:
    """A field's default; dataclasses.MISSING without one."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def typed(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    """A JSON value as the type of an annotation."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        settings = None if default is dataclasses.MISSING else default
        return from_plain(hint, value, where=where, default=settings)
    if origin in (typing.Union, types.UnionType):  # the first type, or None, or a word
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            if typing.get_origin(argument) is typing.Literal and value in typing.get_args(argument):
                return typed(argument, value, where)
        return typed(arguments[0], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ContractError(
                f"{where} is {_short(value)}, expected one of {', '.join(map(repr, arguments))}"
            )
        return value
    kind: Any = origin or hint
    if kind is tuple and isinstance(value, (list, tuple)):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) != len(value):
            raise ContractError(f"{where} has {len(value)} values, expected {len(hints)}")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(typed(hint, item, f"{where}[{number}]") for number, (hint, item) in pairs)
    if kind is float and _is_number(value):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and not _is_number(value)):
        raise ContractError(f"{where} is {_short(value)}, expected {kind.__name__}")
    if kind is dict and arguments:
        return {key: typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is list and arguments:
        return [
            typed(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)
        ]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return printable(text if len(text) <= 80 else text[:77] + "...")


# Safetensors files: the header, checked against the file's size before anything is allocated, and
# the tensors.

MAX_HEADER = 100_000_000  # bytes, the library's own limit
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Entry(NamedTuple):
    """A tensor of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the data, which begin after the header
    stop: int


class Header(NamedTuple):
    """Tensors in order of their bytes, the metadata, and where the data begin."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def load_tensors(
    path: str | os.PathLike[str], *, fix: str = "copy or export it again"
) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU. Raises as ``read_header``."""
    from safetensors.torch import load_file

    read_header(path, fix=fix)
    return load_file(path)


def read_header(path: str | os.PathLike[str], *, fix: str = "copy or export it again") -> Header:
    """Read and check a file's header. Raises ContractError naming the file and ``fix``, OSError."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            return parse_header(size, lambda count, start: os.pread(file.fileno(), count, start))
        except ValueError as error:
            raise ContractError(
                f"{path} is not a complete safetensors file: {error}; {fix}"
            ) from error


def parse_header(size: int, read: Callable[[int, int], bytes]) -> Header:
    """The header of a file of ``size`` bytes; ``read``: so many bytes, from an offset on. Raises
    ValueError unless every byte of the data belongs to exactly one tensor, and a tensor's shape is
    that of its bytes."""
    head = read(8, 0)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"it has {size} bytes, its header {length}")
    try:
        header = json.loads(read(length, 8))
        metadata = header.pop("__metadata__", None) or {}
        entries: dict[str, Entry] = {}
        end = 0
        for name, body in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = body["data_offsets"]
            entry = Entry(str(body["dtype"]), tuple(body["shape"]), start, stop)
            whole = all(
                type(number) is int and number >= 0 for number in (*entry.shape, start, stop)
            )
            if (
                not whole
                or start != end
                or stop - start != math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
            ):
                raise ValueError(f"{name} has shape {entry.shape} in bytes {start} to {stop}")
            entries[name] = entry
            end = stop
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged header ({error!r})") from error
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, expected {8 + length + end}")
    return Header(entries, metadata, 8 + length)


# of an image; where PIL begins to warn of decompression bombs, 268 MB as RGB
MAX_PIXELS = 89_478_485
# longer to shorter side; with its shorter side at 448 pixels such an image has 154 MB
MAX_ASPECT = 256


def check_image_size(width: int, height: int) -> None:
    """Raise ValueError for more than MAX_PIXELS or MAX_ASPECT."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        limits = f"{MAX_PIXELS:,} pixels and sides in a ratio of {MAX_ASPECT}"
        raise ValueError(
            f"the image has {width} x {height} pixels; the limits are {limits}; crop or resize it"
        )


# Names in a run folder and its metrics.jsonl, and how the run was started. Needs the standard
# library alone.

CHECKPOINTS = "checkpoints"  # folder
LATEST = "latest"  # name of the newest checkpoint, in that folder
METRICS = "metrics.jsonl"
LOCK = "run.lock"
UNFINISHED_HEADS = "heads.pt"  # state of a fit of the heads that was stopped

# events of metrics.jsonl
HEADS = "heads"  # of the fit of the heads on the frozen tower, before step 1
SAVED = "checkpoint"  # a checkpoint is complete
SAVE_FAILED = "checkpoint failed"
LEFT_OUT = "batch left out"  # its loss or gradient was not finite
STOPPED = "stopped"  # by a signal, and saved
FAILED = "failed"  # by an error

# files for the job script that started a run: scripts/slurm/torchrun.sbatch
PROGRESS = "progress"  # a checkpoint, or a shard of embed, is complete
FINAL = "final"  # the exit status of an error that a rerun would meet again

HEADLINE = ("i2t_r1", "t2i_r1")  # of a tower's scores: recall over all captions
OF_BENCHMARK = (*HEADLINE, "mean", "acc1")  # of a benchmark NAME: NAME/mean ...


def tell_job(name: str, text: str = "") -> None:
    """Leave a file in the folder that the job script has named, if there is one. Nothing depends on
    whether it can."""
    if folder := os.environ.get("LLM2CLIP_JOB_DIR"):
        with suppress(OSError):
            Path(folder, name).write_text(text + "\n", encoding="utf-8")


def headline(scores: Iterable[str]) -> list[str]:
    """The names of the scores to show: of all captions, and of benchmarks; all where there are none
    (stage 1)."""
    names = list(scores)
    return [
        n for n in names if n in HEADLINE or (":" not in n and n.rpartition("/")[2] in OF_BENCHMARK)
    ] or names


def started_by(command: str, words: Sequence[str]) -> dict[str, Any]:
    """For run.json: the words of the ``llm2clip`` command, its ranks and folder."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {"words": [command, *words], "ranks": ranks, "folder": os.getcwd()}


def again(command: dict[str, Any]) -> str:
    """The shell command that goes on, from ``started_by``, without ``--resume PATH``; "" if nothing
    was recorded."""
    words = command.get("words")
    folder = command.get("folder")
    ranks = command.get("ranks", 1)
    if not words:
        return ""
    line = shlex.join(["llm2clip", *words])
    line = re.sub(r" --resume([-_]from[-_]checkpoint)?[ =]('[^']*'|\S)+", "", line)
    if folder and folder != os.getcwd():
        line = f"cd {shlex.quote(folder)} && {line}"
    if ranks > 1:
        line += f"  # on {ranks} ranks: under the launcher that started it"
    return line


def discover(package: str, attribute: str) -> dict[str, Any]:
    """``attribute`` of every module in the folder of ``package`` that has it, or each one in a list
    of them, by its ``name``. Raises ValueError if two members share a name."""
    members: dict[str, Any] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        value = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, [])
        for member in value if isinstance(value, list) else [value]:
            if member.name in members:
                name = f"{attribute}.name {member.name!r}"
                raise ValueError(f"two members of {package} have the {name}; rename one")
            members[member.name] = member
    return members


# environment variable: seconds that a server may take to connect, or to send more
TIMEOUT = "LLM2CLIP_TIMEOUT"


def timeout() -> float:
    """Seconds that a server may take to connect, and between two pieces of an answer."""
    text = os.environ.get(TIMEOUT) or "30"
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise ValueError(f"{TIMEOUT} is {text!r}, expected seconds above 0")
    return float(text)


def can_only_be_a_path(name: str) -> bool:
    """Whether a name cannot be a Hub id: ``owner/name`` or, of some old models, ``name``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def hub_snapshot(
    repository: str, *, revision: str | None = None, patterns: Sequence[str] | None = None
) -> Path:
    """The folder of a Hub repository's files, downloaded if they are not cached. Raises
    TimeoutError if the Hub does not answer for ``timeout()`` seconds and nothing is cached, else
    ``huggingface_hub``'s OSError or ValueError."""
    from huggingface_hub import snapshot_download

    allowed = None if patterns is None else list(patterns)
    try:
        check_hub_answers(repository, revision=revision)
    except TimeoutError as silence:
        try:
            return Path(
                snapshot_download(
                    repository, revision=revision, allow_patterns=allowed, local_files_only=True
                )
            )
        except (OSError, ValueError):
            raise silence from None
    return Path(snapshot_download(repository, revision=revision, allow_patterns=allowed))


def check_hub_answers(repository: str, *, revision: str | None = None) -> None:
    """Ask the Hub for a repository: any answer will do. Raises TimeoutError after ``timeout()``
    seconds without one."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(repository, revision=revision, timeout=timeout())
    except Exception as error:  # of requests or of httpx, by the client's version
        if any("Timeout" in kind.__name__ for kind in type(error).__mro__):
            hub = f"the Hugging Face Hub ({constants.ENDPOINT})"
            problem = f"{hub} has not answered for {timeout():g} s ({TIMEOUT})"
            fix = "set HF_HUB_OFFLINE=1 to use downloaded files"
            raise TimeoutError(f"{problem}; check the network and HF_ENDPOINT, or {fix}") from error


LONGEST_RETRY_AFTER = 300.0  # seconds that a server may request
_jitter = random.Random()  # not the global generator, whose state belongs to the run


class Retry(NamedTuple):
    """When to try again, and when to give up."""

    tries: int = 8  # consecutive failures before giving up ...
    patience: float = 300.0  # ... or seconds spent in failed attempts, pauses not counted
    first_pause: float = 0.5  # seconds after a failure, about; doubles up to ...
    longest_pause: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt, random so that many processes don't return together."""
        full = min(self.longest_pause, self.first_pause * 2 ** (failures - 1))
        return full * _jitter.uniform(0.5, 1.0)


def seconds_of_retry_after(header: str) -> float:
    """Seconds that a server wants to be left alone for, by the text of its header Retry-After; 0
    for a date."""
    return min(float(header), LONGEST_RETRY_AFTER) if header.strip().isdigit() else 0.0
