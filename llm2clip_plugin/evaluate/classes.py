"""Images with one class each: folders of ImageNet's layout, tars with .cls members, or a field of a data set's JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path

from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.data.sources.tar_scan import scan_tar, split_name

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
NO_CLASS = (".", "embeddings-")  # beginnings of folders that are no class: hidden ones, the prompts' cache
NAME_FILES = ("classnames.txt", "classes.txt")
TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")


class LabelledImages(ABC):
    """N images, each with a key and the number of its class among ``classes``."""

    def __init__(self, name: str, classes: list[str], keys: list[str], labels: list[int], clusters: list[str]) -> None:
        if not keys:
            raise ValueError(f"{name} holds no images")
        self.name = name
        self.classes = classes  # as the data names them: folders, values of the field, or the numbers of .cls members
        self.keys = keys
        self.labels = labels
        self.clusters = clusters  # drawn together in the bootstrap, kept together when a part is held out

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def image(self, number: int) -> bytes:
        """The image file's bytes. Raises BrokenSample if it is missing."""


class FolderImages(LabelledImages):
    """``CLASS/**/IMAGE.jpg``; classes in the order of their folders' names. The prompts' cache beside them is none."""

    def __init__(self, path: Path) -> None:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(NO_CLASS))
        found = [(label, file) for label, folder in enumerate(folders) for file in sorted(folder.rglob("*"))]
        found = [(label, file) for label, file in found if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS]
        self.files = [file for _, file in found]
        keys = [str(file.relative_to(path)) for file in self.files]
        super().__init__(str(path), [folder.name for folder in folders], keys, [label for label, _ in found], keys)

    def image(self, number: int) -> bytes:
        try:
            return self.files[number].read_bytes()
        except OSError as error:
            raise BrokenSample(self.name, self.keys[number], f"can't be read: {error.strerror}") from error


class TarImages(LabelledImages):
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class's number in text."""

    def __init__(self, path: Path) -> None:
        tars = [path] if path.is_file() else sorted(path.rglob("*.tar"))
        keys, labels = [], []
        self.places: list[tuple[Path, int, int]] = []
        for tar in tars:
            parts: dict[str, dict[str, tuple[int, int]]] = {}
            for member in scan_tar(tar):
                key, ending = split_name(member.name)
                parts.setdefault(key, {})["image" if ending in IMAGE_ENDINGS else ending] = (member.offset, member.size)
            for key, of_key in parts.items():
                if "image" in of_key:
                    keys.append(f"{tar.stem}/{key}")
                    labels.append(self._number(tar, key, of_key))
                    self.places.append((tar, *of_key["image"]))
        classes = [str(number) for number in range(max(labels, default=-1) + 1)]
        super().__init__(str(path), classes, keys, labels, keys)

    @staticmethod
    def _number(tar: Path, key: str, parts: dict[str, tuple[int, int]]) -> int:
        if "cls" not in parts:
            raise ValueError(f"{tar}: {key} has no .cls member with the number of its class")
        text = _read(tar, *parts["cls"]).decode("utf-8", "replace").strip()
        if not text.isdecimal():
            raise ValueError(f"{tar}: {key}.cls holds {text!r}, expected the number of a class, from 0")
        return int(text)

    def image(self, number: int) -> bytes:
        return _read(*self.places[number])


class FieldImages(LabelledImages):
    """Any captioned data set; the class is a field of each sample's JSON, ``cluster`` another one."""

    def __init__(self, source: Source, field: str, cluster: str = "") -> None:
        self.source = source
        keys, values, clusters = [], [], []
        for number in range(len(source)):
            raw = source.raw(number)
            for name in filter(None, (field, cluster)):
                if name not in raw.meta:
                    raise ValueError(f"{source.path}: {raw.key!r} has no field {name!r}; it has {sorted(raw.meta)}")
            keys.append(raw.key)
            values.append(str(raw.meta[field]))
            clusters.append(str(raw.meta[cluster]) if cluster else raw.key)
        classes = sorted(set(values))
        number_of = {value: number for number, value in enumerate(classes)}
        super().__init__(source.path, classes, keys, [number_of[value] for value in values], clusters)

    def image(self, number: int) -> bytes:
        return self.source.image(number)


def open_labelled(path: str, field: str = "", cluster: str = "") -> LabelledImages:
    """Labelled images behind ``path``: with ``field`` a captioned data set, else tars with .cls or folders of classes.

    Raises FileNotFoundError or ValueError, saying what was expected.
    """
    if field:
        return FieldImages(open_source(SourceConfig(path=path)), field, cluster)
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"no labelled images at {path}")
    if where.is_file() or any(where.rglob("*.tar")):
        return TarImages(where)
    if any(entry.is_dir() for entry in where.iterdir()):
        return FolderImages(where)
    raise ValueError(
        f"{path} holds neither a folder a class, nor tars with .cls members; or name a field: --label FIELD"
    )


def read_class_names(path: str, data: str, classes: list[str]) -> list[str]:
    """A name for each class: from ``path``, or ``classnames.txt`` in the data's folder or above, or the classes' own.

    A text file holds one name a line in the order of the classes, or ``CLASS<TAB>NAME``; JSON a list or a mapping.
    Raises ValueError if a class has no name, or there are more names than classes in a file without class ids.
    """
    file = Path(path) if path else _beside(data, NAME_FILES)
    if file is None:
        return [name.replace("_", " ") for name in classes]
    if not file.is_file():
        raise FileNotFoundError(f"no file of class names at {file}")
    text = file.read_text("utf-8")
    if file.suffix == ".json":
        body = json.loads(text)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        mapped = all("\t" in line for line in lines)
        body = dict(line.split("\t", 1) for line in lines) if mapped else lines
    if isinstance(body, dict):
        if lacking := [name for name in classes if name not in body]:
            raise ValueError(f"{file} names no class {lacking[0]!r} ({len(lacking)} of {len(classes)} are lacking)")
        return [str(body[name]) for name in classes]
    numbered = classes == [str(number) for number in range(len(classes))]
    if len(body) != len(classes) and not (numbered and len(body) > len(classes)):  # a split may lack the last classes
        raise ValueError(f"{file} has {len(body)} names, the data has {len(classes)} classes")
    return [str(name) for name in body]


def read_templates(path: str, data: str) -> list[str]:
    """Prompt templates with ``{c}`` or ``{}`` for the class; from ``path``, or the data's folder, or one plain one."""
    file = Path(path) if path else _beside(data, TEMPLATE_FILES)
    if file is None:
        return ["a photo of a {c}."]
    if not file.is_file():
        raise FileNotFoundError(f"no file of templates at {file}")
    text = file.read_text("utf-8")
    lines = json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    if wrong := [line for line in lines if "{c}" not in line and "{}" not in line]:
        raise ValueError(f"{file}: template {wrong[0]!r} has no {{c}} in the place of the class")
    if not lines:
        raise ValueError(f"{file} holds no template")
    return lines


def prompt(template: str, name: str) -> str:
    """The template with the class's name in it."""
    return template.replace("{c}", name).replace("{}", name)


def _beside(data: str, names: tuple[str, ...]) -> Path | None:
    """The first of these files in the data's folder or the one above."""
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    return next((place / name for place in (folder, folder.parent) for name in names if (place / name).is_file()), None)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
