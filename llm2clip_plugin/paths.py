"""Paths that are mistyped every day, found before any library is loaded: an input that is not there, an output that
would destroy something. What is at a path is for its reader to say. Standard library only."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.names import joined, nearest
from llm2clip_plugin.outside.timeouts import can_only_be_a_path

DATA, LLM, ADAPTER = "data", "LLM", "adapter"
INPUTS = {  # field -> what is there
    **dict.fromkeys(("path", "source.path", "data.path", "data.validation", "data", "train", "test"), DATA),
    **dict.fromkeys(("pairs.data", "measure.captions", "evaluation.captions", "post_data"), DATA),
    **dict.fromkeys(("encoder.llm", "teacher.llm", "llm", "tokenizer"), LLM),
    **dict.fromkeys(("encoder.adapter", "teacher.adapter", "adapter"), ADAPTER),
}
EXPECTED = {
    DATA: "a folder of .tar shards, a .tar, .jsonl or LLaVA's .json",
    LLM: "a Hugging Face model folder, or a Hub id (owner/name)",
    ADAPTER: "the folder of a PEFT adapter, or a Hub id",
}
FOLDERS = ("output_dir", "cache")  # fields with a folder to write
FILES = ("output", "json", "html", "markdown")  # fields with a file to write, in some commands
NEVER_WRITTEN = (".tar", ".jsonl", ".csv", ".tsv", ".txt", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".parquet")
EXPORTS = ("export", "import", "export-llm", "llava export")  # --output is a folder with a model
MODEL_FILES = ("config.json", "adapter_config.json", "open_clip_config.json", "*.onnx")


def check_paths(command: Command[Any], values: Mapping[str, Any]) -> None:
    """Raise FileNotFoundError, FileExistsError or ValueError that names a path and what to do.

    values: of the options that were given, by field.
    """
    for name in values:
        for path in _texts(values[name]):
            if INPUTS.get(name) and is_missing(path, INPUTS[name]):
                folder, last = os.path.split(path.rstrip("/"))
                near = nearest(last, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
                raise FileNotFoundError(
                    joined(f"no {INPUTS[name]} at {path}{near}", f"expected {EXPECTED[INPUTS[name]]}")
                )
            if INPUTS.get(name) == LLM and os.path.isfile(f"{path}/config.json") and not _has_tokenizer(Path(path)):
                raise FileNotFoundError(f"{command.written(name)} {path} has no tokenizer; expected {EXPECTED[LLM]}")
            if name in FOLDERS and os.path.isfile(path):
                raise FileExistsError(f"{command.written(name)} {path} is a file; expected a folder")
            suffixes = (*NEVER_WRITTEN, ".json") if name in ("html", "markdown") else NEVER_WRITTEN
            if name in FILES and os.path.isfile(path) and path.endswith(suffixes):
                raise FileExistsError(f"{command.written(name)} {path} exists and would be lost; choose another path")
    if command.name in EXPORTS and "output" in values:
        inputs = [path for name in values if name != "output" for path in _texts(values[name])]
        _check_export(Path(values["output"]).expanduser(), inputs, overwrite=bool(values.get("overwrite")))


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, tuple | list) else [value]
    return [str(item) for item in items if item and isinstance(item, (str, Path))]


def is_missing(path: str, kind: str) -> bool:
    """Whether a local path is not there; a Hub id, a URL, a wildcard or braces is none."""
    if os.path.exists(os.path.expanduser(path)) or "://" in path:
        return False
    return not (glob.has_magic(path) or "{" in path) if kind == DATA else can_only_be_a_path(path)


def _has_tokenizer(folder: Path) -> bool:
    return any(next(folder.glob(name), None) for name in ("tokenizer*", "vocab*", "*.model"))


def _check_export(output: Path, inputs: list[str], *, overwrite: bool) -> None:
    """Refuse a folder that has files, or, with --overwrite, that has the input or is not an exported model."""
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists and is not empty; choose another path or pass --overwrite")
    for path in inputs:
        if os.path.exists(path) and Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"--output {output} has the input {path}, which --overwrite would delete; choose another")
    if not any(next(output.glob(name), None) for name in MODEL_FILES):
        raise ValueError(f"--output {output} is no model, and --overwrite deletes all that is in it; choose another")
