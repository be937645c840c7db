"""What is at a path, by file names and config.json alone: a wrong one is named before any library is loaded.

An option is refused only what is recognized as something else, or a local path that is not there; everything that is
not recognized is left to its reader. Standard library only.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm2clip_plugin.options.names import joined, nearest
from llm2clip_plugin.options.parser import Parser
from llm2clip_plugin.outside.timeouts import can_only_be_a_path

MODELS = {
    "adapter": "a PEFT adapter",
    "clip": "an image-text model",
    "llava": "a LLaVA checkpoint",
    "llm": "a language model",
    "tower": "a tower directory",
    "vision": "a vision model",
}
KINDS = {
    **MODELS,
    "cache": "an embedding cache",
    "data": "a data set",
    "run": "a training run",
    "scores": "a score file",
    "weights": "a file of weights",
}
WANTED = {  # of a role: what is accepted, and how errors say it
    "data": ({"data"}, "captioned images: a folder of .tar shards, a .tar, .jsonl or LLaVA's .json"),
    "pictures": ({"data"}, "a folder of pictures, or a table with a column of their paths: .csv, .tsv, .parquet"),
    "llm": ({"llm", "clip"}, "an LLM: a Hugging Face model folder, or a Hub id (owner/name)"),
    "tokenizer": ({"llm", "clip", "adapter", "llava"}, "a folder with a tokenizer, or a Hub id (owner/name)"),
    "adapter": ({"adapter"}, "the folder of a PEFT adapter, or a Hub id"),
    "cache": ({"cache"}, "the folder of an embedding cache"),
    "start": ({"tower", "vision", "clip", "llava"}, "a tower directory, a vision model or a Hub id (owner/name)"),
    "tower": ({"tower", "vision", "clip"}, "a tower directory or a Hub id (owner/name)"),
    "run": ({"run", "tower"}, "a training run or a tower directory"),
    "checkpoint": ({"tower", "vision", "clip", "weights", "llava"}, "a vision or image-text checkpoint"),
    "llava": ({"llava", "adapter"}, "a LLaVA checkpoint"),
}
# fields of a command's settings, or argparse's names -> role; "COMMAND FIELD" goes before "FIELD"
ROLES = {
    **dict.fromkeys(("path", "source.path", "data.path", "data.validation", "data", "train", "test"), "data"),
    **dict.fromkeys(("pairs.data", "measure.captions", "evaluation.captions", "captions", "post_data"), "data"),
    **dict.fromkeys(("encoder.llm", "teacher.llm", "llm"), "llm"),
    **dict.fromkeys(("encoder.adapter", "teacher.adapter", "adapter"), "adapter"),
    **dict.fromkeys(("cache", "data.cache", "data.clip_cache", "data.validation_cache"), "cache"),
    **dict.fromkeys(("tower", "towers"), "tower"),
    **dict.fromkeys(("model_path", "checkpoint", "checkpoints"), "llava"),
    "tokenizer": "tokenizer",
    "tower.path": "start",
    "run tower": "start",
    "run questions": "data",
    "run llava_llm": "llm",
    "data make path": "pictures",
    "export source": "run",
    "export checkpoint": "",
    "import source": "checkpoint",
    "llava export tower": "",
    "llava bundle tower": "",
}
EXPORTS = ("export", "import", "export-llm", "llava export")  # --output is a folder with a model
REPORTS = {"output", "json", "html", "markdown"}  # options with a file to write, in some commands
NO_SCORES = ("compare", "search")  # commands whose reports are no score files
MUST_EXIST = {"data": "data", "pictures": "pictures", "llm": "LLM", "adapter": "adapter"}  # others' readers say more
LOOKED_AT = 1000  # entries of a folder
TEXTS = (".txt", ".csv", ".tsv")


def checked(declared: Any, argv: Sequence[str]) -> Any:
    """What a Command or a Parser reads from the words; raises as ``check_paths``."""
    read = declared.read(argv)
    if isinstance(declared, Parser):
        actions = declared._actions
        names = {one.dest: one.option_strings[0] if one.option_strings else str(one.metavar) for one in actions}
        check_paths(declared.prog.removeprefix("llm2clip "), vars(read), names)
    else:
        check_paths(declared.name, read.values, {field: declared.placeholder(field) for field in read.values})
    return read


def check_paths(command: str, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise ValueError or FileNotFoundError for an option with a path to something else than it takes.

    values: of the options that were given, by field; names: the options as they are written.
    """
    roles = {field: ROLES.get(f"{command} {field}", ROLES.get(field, "")) for field in values}
    for field, role in roles.items():
        for path in _texts(values[field]):
            if role and path:
                others = {names[one]: roles[one] for one in values if one != field and roles[one]}
                check_path(role, path, names[field], others)
    for field in REPORTS.intersection(values):
        for path in _texts(values[field]):
            kind = kind_of(path) if os.path.isfile(path) else ""
            if kind in ("data", "weights") or (kind == "scores" and command in NO_SCORES):
                raise FileExistsError(f"{names[field]} {path} is {KINDS[kind]} and would be lost; choose another path")
    if command in EXPORTS and (output := str(values.get("output") or "")):
        inputs = [text for field, role in roles.items() if role for text in _texts(values[field])]
        _check_output(output, inputs, overwrite=bool(values.get("overwrite")))


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [str(item) for item in items if isinstance(item, (str, Path))]


def check_path(role: str, path: str, option: str, others: Mapping[str, str] = MappingProxyType({})) -> None:
    """``check_paths`` of one option; others: written names of the command's other options -> role."""
    accepted, wanted = WANTED[role]
    kind = kind_of(path)
    if kind == "" and role in MUST_EXIST and _is_missing(path, role):
        folder, name = os.path.split(path.rstrip("/"))
        near = nearest(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
        raise FileNotFoundError(joined(f"no {MUST_EXIST[role]} at {path}{near}", f"expected {wanted}"))
    if not kind or kind in accepted:
        if role == "llm" and kind == "llm":
            check_llm(path)
        return
    inside = {"adapter": "adapter", "llm": "adapter", "tower": "tower", "start": "tower"}.get(role, "")
    hint = f"expected {wanted}"
    if kind == "run" and inside and os.path.isdir(os.path.join(path, inside)):
        hint = f"its {inside} is {os.path.join(path, inside)}{' (--adapter)' * (role == 'llm')}"
    elif swapped := next((name for name, other in others.items() if kind in WANTED[other][0]), ""):
        hint = f"did you mean it for {swapped}?"
    elif role == "run" and kind in ("vision", "clip"):
        hint = "`llm2clip import` makes a tower directory of it"
    raise ValueError(f"{option} {path} is {KINDS[kind]}{_model_type(path)}; {hint}")


def _is_missing(path: str, role: str) -> bool:
    """Whether a local path is not there; a Hub id, a URL, a wildcard or braces is none."""
    if os.path.exists(os.path.expanduser(path)) or "://" in path:
        return False
    if role in ("data", "pictures"):
        return not (glob.has_magic(path) or "{" in path)
    return can_only_be_a_path(path)


def kind_of(path: str) -> str:
    """The key of KINDS for what is at ``path``; "" for anything that is not recognized, and for nothing."""
    place = Path(path).expanduser()
    try:
        if place.is_file():
            return _kind_of_file(place)
        if not place.is_dir():
            return ""
        return _kind_of_folder(place)
    except OSError:
        return ""


def _kind_of_file(place: Path) -> str:
    if place.suffix in (".safetensors", ".bin", ".pt", ".pth", ".npz"):
        return "weights"
    if place.suffix in (".tar", ".jsonl", *TEXTS):
        return "data"
    if place.suffix != ".json":
        return ""
    with place.open("rb") as file:
        start = file.read(200)
    return "scores" if b'"llm2clip-scores"' in start else "data" if start.lstrip().startswith(b"[") else ""


def _kind_of_folder(place: Path) -> str:
    with os.scandir(place) as entries:
        endings = {os.path.splitext(entry.name)[1] for entry in itertools.islice(entries, LOOKED_AT)}
    if ".tar" in endings:
        return "data"
    for file, kind in (("run.json", "run"), ("embed.json", "cache"), ("llm2clip.json", "tower")):
        if (place / file).is_file():
            return kind
    config = read_config(place)
    if str(config.get("model_type", "")).startswith("llava") or "mm_vision_tower" in config:
        return "llava"
    if (place / "adapter_config.json").is_file():
        return "adapter"
    if (place / "manifest.json").is_file() and b'"llm2clip-cache"' in (place / "manifest.json").read_bytes()[:200]:
        return "cache"
    if (place / "open_clip_config.json").is_file():
        return "clip"
    if any(place.glob("*.onnx")):
        return "tower"
    if isinstance(config.get("vision_config"), dict):
        return "" if any("image_token" in key for key in config) else "clip"  # a multimodal LLM is either
    if "vocab_size" in config or "text_config" in config:
        return "llm"
    if config and ("image_size" in config or "patch_size" in config or "pretrained_cfg" in config):
        return "vision"
    return "data" if ".jsonl" in endings else ""


def read_config(place: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a model's folder; {} if there is none that can be read."""
    try:
        config = json.loads((place / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _model_type(path: str) -> str:
    kind = read_config(Path(path).expanduser()).get("model_type")
    return f" ({kind})" if isinstance(kind, str) and kind else ""


def check_llm(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a language model's folder that is quantized already or has no tokenizer."""
    place = Path(path).expanduser()
    quantized = read_config(place).get("quantization_config")
    if isinstance(quantized, dict):
        method = str(quantized.get("quant_method", "quantized")).upper().replace("BITSANDBYTES", "bitsandbytes")
        raise ValueError(
            f"{path} is saved quantized ({method}), and LoRA, merging and its fingerprint need the original weights; "
            "take the model that it was made from, with --load-in-4bit if memory is short"
        )
    if not any(place.glob("tokenizer*")) and not any(place.glob("vocab*")) and not any(place.glob("*.model")):
        raise ValueError(f"{path} has no tokenizer (no tokenizer.json or tokenizer.model); copy it from the original")


def _check_output(output: str, inputs: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a folder that has files, or, with --overwrite, that has the input or is not an exported model."""
    place = Path(output).expanduser()
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists and is not empty; choose another path or pass --overwrite")
    for path in inputs:
        if os.path.exists(path) and Path(path).resolve().is_relative_to(place.resolve()):
            raise ValueError(f"--output {output} has the input {path}, which --overwrite would delete; choose another")
    if (kind := kind_of(output)) not in MODELS:
        raise ValueError(
            f"--output {output} is {KINDS.get(kind, 'a folder that is no model')}, and --overwrite deletes all that is "
            "in it; choose another path"
        )
