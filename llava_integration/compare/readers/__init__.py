"""Logs of other evaluators, one file a format; each defines ``READER``, and a new file is a new format.

A reader makes score files of logs, with an item for each question: ``id``, ``score`` (higher is better), ``cluster``
(what is resampled together: the questions of one image), ``category`` and ``truth`` where the log has them, and what a
composite's rule reads (``benchmarks/rules/``). Standard library only; what a format needs more is imported in its file.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.answers import json_lines
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.files import ContractError, discover

IMAGES = ("image_id", "imageId", "img_id", "image_name", "image_path", "img_path", "image")  # a question's image
OWN = "score files"  # name of the reader of ours, which take precedence
CATEGORIES = ("category", "group", "subset", "question_type", "task")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One form of logs."""

    name: str  # as in messages: "lmms-eval"
    endings: tuple[str, ...]  # of its files
    fits: Callable[[Path], bool]  # whether a file with such an ending is a log of this form; reads only its start
    read: Callable[[Path], Iterable[ScoreFile]]  # one for each task, scorer or run in the file; ContractError


def readers() -> dict[str, Reader]:
    """Every reader by name."""
    return discover(__name__, "READER")


def read_logs(path: Path) -> list[tuple[Path, ScoreFile]]:
    """The scores in a log, or in all logs below a folder, which must be of one form; none if there is no log.

    Raises ContractError for a log that cannot be read, or for logs of several forms in one folder.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found: dict[Reader, list[Path]] = {}
    for reader in sorted(readers().values(), key=lambda one: one.name != OWN):
        logs = [file for file in files if file.name.endswith(reader.endings) and file.is_file() and reader.fits(file)]
        if logs:
            found[reader] = logs
            if reader.name == OWN:
                break
    if len(found) > 1:
        listed = "; ".join(f"{reader.name}: {logs[0]}" for reader, logs in found.items())
        raise ContractError(f"{path} has logs of {len(found)} forms ({listed}); name the folder or file of one")
    return [(log, record) for reader, logs in found.items() for log in logs for record in reader.read(log)]


def first_object(path: Path) -> dict[str, Any]:
    """The first line of a JSONL file, empty if it is not one."""
    try:
        return next((value for _, value in islice(json_lines(path), 1)), {})
    except ContractError:
        return {}


def number(value: Any, where: str) -> float:
    """A score as a number; ContractError for anything else. True is 1."""
    if isinstance(value, (int, float)) and abs(value) <= 1e12:
        return float(value)
    raise ContractError(f"{where} is {value!r}; expected a finite number")


def first_of(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of these fields that is a text or a number, as text; "" if there is none."""
    return next((str(values[name]) for name in names if isinstance(values.get(name), (str, int))), "")
