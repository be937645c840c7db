"""Paths that are mistyped every day, found before any library is loaded: an input that is not
there, an output that would destroy something. What is at a path is for its reader to say."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llm2clip_plugin.folders import KINDS, refuse_foreign
from llm2clip_plugin.hub import can_only_be_a_path
from llm2clip_plugin.options.parser import Command

DATA = "data"
LLM = "LLM"
ADAPTER = "adapter"
INPUTS = {  # field -> what is there
    **dict.fromkeys(
        (
            "path",
            "source.path",
            "data.path",
            "data.validation",
            "data",
            "train",
            "test",
        ),
        DATA,
    ),
    **dict.fromkeys(("pairs.data", "measure.captions", "evaluation.captions"), DATA),
    **dict.fromkeys(("encoder.llm", "teacher.llm", "llm", "tokenizer"), LLM),
    **dict.fromkeys(("encoder.adapter", "teacher.adapter", "adapter"), ADAPTER),
}
# fields with a file or folder to write
OUTPUTS = (
    "output_dir",
    "cache",
    "output",
    "json",
)
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


def check_paths(command: Command[Any], argv: Sequence[str]) -> None:
    """Raise FileNotFoundError, FileExistsError or ValueError that names a path and what to do, or
    as ``read``."""
    values, _ = command.read(argv)
    given: list[tuple[str, str]] = []
    for name in command.leaves:
        value = values.get(name)
        items = value if isinstance(value, tuple | list) else [value]
        for item in items:
            if item and isinstance(item, (str, Path)):
                given.append((name, str(item)))
    for name, path in given:
        kind = INPUTS.get(name)
        wanted = f"expected {command.leaves[name].setting.help}"
        written = command.written(name)
        # a Hub id, a URL, a wildcard or braces is not missing
        if kind == DATA:
            is_local = not (glob.has_magic(path) or "{" in path)
        else:
            is_local = can_only_be_a_path(path)
        is_local = is_local and "://" not in path
        if kind and is_local and not os.path.exists(os.path.expanduser(path)):
            raise FileNotFoundError(f"no {kind} at {path}; {wanted}")
        if (
            kind == LLM
            and os.path.isfile(f"{path}/config.json")
            and not _has_any(path, TOKENIZERS)
        ):
            raise FileNotFoundError(f"{written} {path} has no tokenizer; {wanted}")
        replaceable = command.name not in KINDS and path.endswith((".json", ".html"))
        if name in OUTPUTS and os.path.isfile(path) and not replaceable:
            raise FileExistsError(
                f"{written} {path} exists and would be lost; choose another path"
            )
    if command.name in KINDS and not values.get("dry_run"):
        output = os.path.expanduser(values["output"])
        overwrite = bool(values.get("overwrite"))
        _check_folder(command.name, output, given, overwrite=overwrite)


def _check_folder(
    command: str, output: str, given: list[tuple[str, str]], *, overwrite: bool
) -> None:
    """Raise as ``check_paths`` for a folder that a command writes as a whole; ``given``: its fields
    with a path."""
    if not _has_any(output, ("*",)):
        return
    if not overwrite:
        raise FileExistsError(
            f"{output} exists and is not empty; choose another path or pass --overwrite"
        )
    for name, path in given:
        if name == "output" or not os.path.exists(path):
            continue
        if Path(path).resolve().is_relative_to(Path(output).resolve()):
            problem = f"--output {output} has the input {path}, which --overwrite would delete"
            raise ValueError(f"{problem}; choose another")
    refuse_foreign(Path(output), KINDS[command])


def _has_any(folder: str, patterns: Iterable[str]) -> bool:
    return any(next(Path(folder).glob(pattern), None) for pattern in patterns)
