"""The folders that commands write, so that ``--overwrite`` replaces these and nothing else.
Standard library only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import VersionedRecord
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.outside import printable

NAMED = 3  # foreign files in an error
# What file managers leave anywhere, and what our commands keep next to the data that they read:
# indexes and caches.
CACHES = ("embeddings-*", "*/embeddings-*", "forecast-*", "*/forecast-*")
CACHE_FILES = ("manifest.json", "embed.json", "*.safetensors")
NEXT_TO_DATA = (
    ".llm2clip/*",
    "*/.llm2clip/*",
    *(f"{cache}/{file}" for cache in CACHES for file in CACHE_FILES),
)
ANYWHERE = (
    ".DS_Store",
    "*/.DS_Store",
    "Thumbs.db",
    "*/Thumbs.db",
    "desktop.ini",
    "*/desktop.ini",
)


@dataclass(frozen=True, kw_only=True)
class FolderRecord(VersionedRecord):
    """``llm2clip-folder.json`` of a folder: the command that wrote it, and the files it wrote."""

    KIND: ClassVar[str] = "llm2clip-folder"
    FILE: ClassVar[str] = "llm2clip-folder.json"

    command: str  # as typed after llm2clip
    files: list[str]  # paths relative to the folder, without this file


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """A kind of folder, and how it is recognized."""

    commands: tuple[str, ...]  # that write it, as typed after llm2clip
    # a new folder gets a FolderRecord, which then is what counts
    recorded: bool = False
    marks: tuple[str, ...] = ()  # without a FolderRecord, one of these files ...
    # ... or of these fields of its config.json shows that the folder is ours, ...
    config_keys: tuple[str, ...] = ()
    # ... and files that match none of these patterns are foreign
    files: tuple[str, ...] = ()


MAKE_FOLDER = FolderKind(
    commands=("data make",),
    recorded=True,
    marks=("left-out.jsonl",),
    files=("left-out.jsonl", "[0-9]*.tar"),
)
SPLIT_FOLDER = FolderKind(
    commands=("data split",),
    recorded=True,
    marks=("split.json",),
    files=(
        "split.json",
        "train.json*",
        "validation.json*",
        "train/*.tar",
        "validation/*.tar",
    ),
)
LLAVA_FOLDER = FolderKind(commands=("llava data",), recorded=True)
MODEL_FOLDER = FolderKind(
    commands=("export", "import", "export-llm", "llava export", "vlm build"),
    marks=("llm2clip.json", "llm2clip_encoder.json"),
    config_keys=("llm2clip_export", "llm2clip_vlm"),
    files=(
        "README.md",
        "config.json",
        "generation_config.json",
        "llm2clip*.json",
        "adapter_config.json",
        "*preprocessor_config.json",
        "processor_config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        *(
            "tokenizer*",
            "vocab.*",
            "merges.txt",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.*",
        ),
        *("*.onnx", "*.onnx.data", "modeling_llava_tower.py", "eva02.py", "wrapped.py"),
        *("teacher-adapter/*.json", "teacher-adapter/*.safetensors"),
        *(".gitattributes", ".cache/huggingface/*"),  # of the Hub
    ),
)
# for other libraries, without a card of ours
CONVERTED_FOLDER = replace(MODEL_FOLDER, recorded=True)
KINDS = {
    command: kind
    for kind in (MAKE_FOLDER, SPLIT_FOLDER, LLAVA_FOLDER, MODEL_FOLDER)
    for command in kind.commands
}


@contextmanager
def output_folder(
    path: str | os.PathLike[str], kind: FolderKind, *, replace: bool = False
) -> Iterator[Path]:
    """As ``atomic_directory``; ``replace`` allows a folder of this kind alone. Raises as
    ``refuse_foreign``."""
    if replace:
        refuse_foreign(Path(path), kind)
    with atomic_directory(path, replace=replace) as temporary:
        yield temporary
        if kind.recorded:
            files = sorted(_files(temporary))
            FolderRecord(command=kind.commands[0], files=files).write(
                temporary / FolderRecord.FILE
            )


def refuse_foreign(folder: Path, kind: FolderKind) -> None:
    """Raise FileExistsError that names a file in ``folder`` that no command of ``kind`` wrote."""
    present = sorted(_files(folder))
    if not present:
        return
    commands = f"`llm2clip {kind.commands[0]}`"
    if len(kind.commands) > 1:
        commands += " or another export"
    advice = "--overwrite would delete that: move it, or choose another --output"
    written = _written(folder, kind)
    if written is None:
        allowed = (*ANYWHERE, *NEXT_TO_DATA)
        foreign = [name for name in present if not _matches(name, allowed)]
        names = _listed(foreign or present)
        raise FileExistsError(
            f"{folder} was not written by {commands}: it has {names}; {advice}"
        )
    names, patterns = written
    patterns = (*patterns, *ANYWHERE, *NEXT_TO_DATA)
    if foreign := [
        name for name in present if name not in names and not _matches(name, patterns)
    ]:
        raise FileExistsError(
            f"{folder} has {_listed(foreign)}, not written by {commands}; {advice}"
        )


def _written(folder: Path, kind: FolderKind) -> tuple[set[str], tuple[str, ...]] | None:
    """Names, and patterns of names, that a command of ``kind`` wrote to the folder; None if none
    wrote it."""
    if (folder / FolderRecord.FILE).is_file():
        record = FolderRecord.read(folder / FolderRecord.FILE)
        is_ours = record.command in kind.commands
        names = {FolderRecord.FILE, *record.files}
        patterns = ()
    elif any((folder / name).is_file() for name in kind.marks):
        is_ours = True
        names = set[str]()
        patterns = kind.files
    else:
        is_ours = _is_in_config(folder / "config.json", kind)
        names = set[str]()
        patterns = kind.files
    return (names, patterns) if is_ours else None


def _is_in_config(path: Path, kind: FolderKind) -> bool:
    """Whether a model's config.json says that a command of ``kind`` wrote it."""
    if not kind.config_keys or not path.is_file():
        return False
    try:
        config = read_json_value(path)
    except (OSError, ContractError):
        return False
    return isinstance(config, dict) and any(key in config for key in kind.config_keys)


def _files(folder: Path) -> Iterator[str]:
    """Relative paths of everything in the folder that is no folder. Links are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern; one without a slash fits no file in a subfolder."""
    fitting = (pattern for pattern in patterns if "/" in pattern or "/" not in name)
    return any(fnmatch(name, pattern) for pattern in fitting)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return printable(", ".join(names[:NAMED])) + more
