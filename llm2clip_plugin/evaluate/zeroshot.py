"""Zero-shot classification: prompts by the names of the classes, their vectors, the scores.

Shapes: N images, C classes, P prompts of a class, D projection dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.features import Dual, encode_texts
from llm2clip_plugin.evaluate.labeled_images import ImageFeatures
from llm2clip_plugin.evaluate.ranks import rank_both
from llm2clip_plugin.evaluate.suites import InMemorySource, Row
from llm2clip_plugin.hashes import canonical_json, sha256_text

NAME_FILE = "classnames.txt"
TEMPLATE_FILE = "zeroshot_classification_templates.txt"
CLASSES = 100  # embedded at once: with 80 prompts 4096 wide 131 MB


def classification_scores(
    features: ImageFeatures, class_CD: Tensor, names: Sequence[str]
) -> ScoreFile:
    """acc1, acc5 (with five classes or more) and mean_per_class_recall; classes of equal score
    split the credit."""
    image_ND = F.normalize(features.feature_ND, dim=1)
    ranks, _ = rank_both(
        image_ND, class_CD, features.label_N, torch.arange(len(class_CD))
    )
    hits = {f"acc{k}": ranks.hits(k) for k in (1, 5) if k <= len(class_CD)}
    return features.scores(
        hits, names, {"acc1": "mean_per_class_recall"}, classes=len(class_CD)
    )


def read_class_names(path: str, data: str, classes: list[str]) -> list[str]:
    """A name for each class: from ``path``, else ``classnames.txt`` next to or above the data, else
    ``classes``.

    The file has one name per line in the order of the classes, or ``CLASS<TAB>NAME``. Raises
    FileNotFoundError without the file ``path``, ValueError if a class has no name, the numbers
    differ, or the file has the classes' own names in another order.
    """
    file, names = _read_lines(path, data, NAME_FILE)
    if names is None:
        return [name.replace("_", " ") for name in classes]
    if all("\t" in name for name in names):
        name_of = dict(name.split("\t", 1) for name in names)
        if missing := [name for name in classes if name not in name_of]:
            count = f"{len(missing)} of {len(classes)} missing"
            raise ValueError(f"{file} has no name for class {missing[0]!r} ({count})")
        return [name_of[name] for name in classes]
    numbered = classes == [str(number) for number in range(len(classes))]
    # a split may be missing classes
    has_more = numbered and len(names) > len(classes)
    if len(names) != len(classes) and not has_more:
        raise ValueError(
            f"{file} has {len(names)} class names, but the data has {len(classes)} classes"
        )
    if not numbered:
        refuse_another_order(file, names, classes)
    return names


def refuse_another_order(file: Path, names: list[str], classes: list[str]) -> None:
    """Raise ValueError if a line has the name of a class that is at another place: `ls` sorts
    without regard to case, for instance, and lists of data sets have orders of their own."""
    place = {folded(name): number for number, name in enumerate(classes)}
    for number, name in enumerate(names):
        if place.get(folded(name), number) != number:
            raise ValueError(
                f"{file}: name {number + 1} is {name!r}, but class {number + 1} is "
                f"{classes[number]!r}; bring the names into the order of the classes "
                "(LC_ALL=C sort), or write CLASS<TAB>NAME in each line"
            )


def folded(name: str) -> str:
    """A name without regard to case and underscores."""
    return name.replace("_", " ").casefold()


def read_templates(path: str, data: str) -> list[str]:
    """Prompt templates: from ``path``, else TEMPLATE_FILE next to or above the data, else one plain
    template.

    ``{c}`` or ``{}`` in a template stands for the class. Raises FileNotFoundError or ValueError.
    """
    file, lines = _read_lines(path, data, TEMPLATE_FILE)
    if invalid := [
        line for line in lines or () if "{c}" not in line and "{}" not in line
    ]:
        raise ValueError(
            f"{file}: template {invalid[0]!r} does not contain {{c}}, "
            "the placeholder for the class name"
        )
    return lines or ["a photo of a {c}."]


def _read_lines(path: str, data: str, name: str) -> tuple[Path, list[str] | None]:
    """The file ``path``, else ``name`` in the data's folder or its parent, and its lines that are
    not blank."""
    folder = _data_folder(data)
    if path:
        file = Path(path)
    else:
        candidates = (folder / name, folder.parent / name)
        file = next(filter(Path.is_file, candidates), None)
        if file is None:
            return folder, None
    return file, [
        line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()
    ]


def _data_folder(data: str) -> Path:
    return Path(data) if Path(data).is_dir() else Path(data).parent


def prompt_source(
    names: Sequence[str], templates: Sequence[str], data: str
) -> InMemorySource:
    """A data source without images: a class is a sample, its prompts are the captions; named by the
    prompts' hash."""
    prompts: list[list[str]] = []
    rows: list[Row] = []
    for number, name in enumerate(names):
        texts = [
            template.replace("{c}", name).replace("{}", name) for template in templates
        ]
        prompts.append(texts)
        captions = tuple(Caption(text, "prompt") for text in texts)
        rows.append(Row(f"{number:05d}", None, captions))
    digest = sha256_text(canonical_json(prompts))[:12]
    return InMemorySource(f"prompts-{digest}", _data_folder(data), rows)


@torch.no_grad()
def class_vectors(
    dual: Dual, prompts: InMemorySource, cache: EmbeddingCache, all_ranks: bool = False
) -> Tensor:
    """(C, D): the mean of each class's normalized prompts, normalized again (Radford et al. 2021,
    section 3.1.4)."""
    means: list[Tensor] = []
    for start in range(0, len(prompts.rows), CLASSES):
        embedded: list[Tensor] = []
        for number, row in enumerate(prompts.rows[start : start + CLASSES], start):
            rows_PW = cache.rows(prompts.name, number, row.captions, key=row.key)
            embedded.append(rows_PW)
        text_ND = encode_texts(dual, torch.cat(embedded), all_ranks)
        text_CPD = text_ND.unflatten(0, (len(embedded), -1))
        means.append(text_CPD.mean(1))
    return F.normalize(torch.cat(means), dim=1)
