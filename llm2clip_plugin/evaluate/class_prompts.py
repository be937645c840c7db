"""The classes of zero-shot classification as text: names, prompt templates, and their vectors.

Shapes: C classes, P prompts of a class, D projection dimension, W width of a teacher embedding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.embedded_pairs import Dual, encode_texts
from llm2clip_plugin.evaluate.in_memory_source import InMemorySource, Row
from llm2clip_plugin.train.distributed import gather_objects, group_of, rank, world_size

NAME_FILES = ("classnames.txt", "classes.txt")
TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")


def read_class_names(path: str, data: str, classes: list[str]) -> list[str]:
    """A name for each class: from ``path``, else ``classnames.txt`` next to or above the data, else ``classes``.

    A text file has one name per line in the order of the classes, or ``CLASS<TAB>NAME``; JSON a list or a mapping.
    Raises FileNotFoundError without the file ``path``, ValueError if a class has no name or the numbers differ.
    """
    file = _find_file(path, data, NAME_FILES)
    if file is None:
        return [name.replace("_", " ") for name in classes]
    names = _read_lines(file)
    if isinstance(names, list) and all("\t" in name for name in names):
        names = dict(name.split("\t", 1) for name in names)
    if isinstance(names, dict):
        if missing := [name for name in classes if name not in names]:
            raise ValueError(f"{file} has no name for class {missing[0]!r} ({len(missing)} of {len(classes)} missing)")
        return [str(names[name]) for name in classes]
    numbered = classes == [str(number) for number in range(len(classes))]
    if len(names) != len(classes) and not (numbered and len(names) > len(classes)):  # a split may be missing classes
        raise ValueError(f"{file} has {len(names)} class names, but the data has {len(classes)} classes")
    return [str(name) for name in names]


def read_templates(path: str, data: str) -> list[str]:
    """Prompt templates: from ``path``, else a file next to or above the data, else one plain template.

    ``{c}`` or ``{}`` in a template stands for the class. Raises FileNotFoundError or ValueError.
    """
    file = _find_file(path, data, TEMPLATE_FILES)
    lines = ["a photo of a {c}."] if file is None else _read_lines(file)
    if invalid := [line for line in lines if "{c}" not in line and "{}" not in line]:
        raise ValueError(f"{file}: template {invalid[0]!r} does not contain {{c}}, the placeholder for the class name")
    if not lines:
        raise ValueError(f"{file} contains no templates")
    return lines


def _find_file(path: str, data: str, names: tuple[str, ...]) -> Path | None:
    """``path``, else the first of ``names`` that exists in the data's folder or its parent."""
    if path:
        return Path(path)
    folder = _data_folder(data)
    candidates = (parent / name for parent in (folder, folder.parent) for name in names)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _data_folder(data: str) -> Path:
    return Path(data) if Path(data).is_dir() else Path(data).parent


def _read_lines(file: Path) -> Any:
    """The contents of a JSON file, or the lines of a text file that are not blank."""
    text = file.read_text("utf-8")
    return json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]


def prompt_source(names: Sequence[str], templates: Sequence[str], data: str) -> InMemorySource:
    """A data source without images: a class is a sample, its prompts are the captions; named by the prompts' hash."""
    prompts = [[template.replace("{c}", name).replace("{}", name) for template in templates] for name in names]
    rows = [
        Row(f"{number:05d}", None, tuple(Caption(text, "prompt") for text in texts))
        for number, texts in enumerate(prompts)
    ]
    return InMemorySource(f"prompts-{sha256_text(canonical_json(prompts))[:12]}", _data_folder(data), rows)


@torch.no_grad()
def class_vectors(dual: Dual, prompts: InMemorySource, cache: EmbeddingCache, *, all_ranks: bool = False) -> Tensor:
    """(C, D): the mean of each class's normalized prompts, normalized again (Radford et al. 2021, section 3.1.4)."""
    group = group_of(all_ranks)
    of_rank: dict[int, Tensor] = {}
    for number in range(rank(group), len(prompts), world_size(group)):
        row = prompts.rows[number]
        teacher_PW = cache.rows(prompts.name, number, row.captions, key=row.key)
        of_rank[number] = F.normalize(encode_texts(dual, teacher_PW).mean(0), dim=0)
    vectors = {number: row for part in gather_objects(of_rank, group) for number, row in part.items()}
    return torch.stack([vectors[number] for number in range(len(prompts))])
