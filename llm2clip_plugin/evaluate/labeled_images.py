"""Images with a class label: ImageNet's folders, tars with .cls members, or a field of a dataset's JSON."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.tar_scan import scan_tar, split_name
from llm2clip_plugin.evaluate.in_memory_source import IMAGE_ENDINGS, InMemorySource, Row, image_files

NOT_A_CLASS = (".", "embeddings-")  # prefixes of other folders: hidden ones, the prompts' cache


@dataclass(frozen=True)
class LabeledImages:
    """N images, each with a label: the index of its class in ``classes``."""

    source: Source
    classes: list[str]  # the data's own names: folders, values of the field, or the numbers in .cls members
    labels: list[int]
    clusters: list[str]  # resampled together in the bootstrap, held out together


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls or class folders.

    ``field`` and ``cluster`` are fields of each sample's JSON. Raises FileNotFoundError, or ValueError for another
    layout.
    """
    if field:
        return _by_field(open_source(SourceConfig(path=path)), field, cluster)
    root = Path(path)
    if root.is_file() or any(root.rglob("*.tar")):
        return _of_tars(root)
    if any(entry.is_dir() for entry in root.iterdir()):
        return _of_folders(root)
    raise ValueError(
        f"{path} has no class folders and no tars with .cls members; for captioned data pass --label FIELD"
    )


def _by_field(source: Source, field: str, cluster: str) -> LabeledImages:
    """Any captioned data source."""
    values, clusters = [], []
    for record in map(source.record, range(len(source))):
        for name in filter(None, (field, cluster)):
            if name not in record.meta:
                known = ", ".join(sorted(record.meta)) or "none"
                raise ValueError(f"{source.path}: {record.key!r} has no field {name!r} in its JSON; known: {known}")
        values.append(str(record.meta[field]))
        clusters.append(str(record.meta[cluster]) if cluster else record.key)
    classes = sorted(set(values))
    number_of = {value: number for number, value in enumerate(classes)}
    return LabeledImages(source, classes, [number_of[value] for value in values], clusters)


def _of_folders(path: Path) -> LabeledImages:
    """``CLASS/**/IMAGE.jpg``; classes in alphabetical order of their folders."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(NOT_A_CLASS))
    images = [(label, file) for label, folder in enumerate(folders) for file in image_files(folder)]
    rows = [Row(str(file.relative_to(path)), file) for _, file in images]
    source = InMemorySource(str(path), path, rows)
    return LabeledImages(source, [folder.name for folder in folders], [label for label, _ in images], _keys(rows))


def _of_tars(path: Path) -> LabeledImages:
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index as text."""
    rows, labels = [], []
    for tar in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        parts: dict[str, dict[str, partial[bytes]]] = {}
        for member in scan_tar(tar):
            key, ending = split_name(member.name)
            read = partial(_read, tar, member.offset, member.size)
            parts.setdefault(key, {})["image" if ending in IMAGE_ENDINGS else ending] = read
        for key, of_key in parts.items():
            if "image" not in of_key:
                continue
            text = of_key["cls"]().decode("utf-8", "replace").strip() if "cls" in of_key else ""
            if not text.isdecimal():
                raise ValueError(f"{tar}: {key}.cls contains {text!r}, expected a class index (0, 1, ...)")
            rows.append(Row(f"{tar.stem}/{key}", of_key["image"]))
            labels.append(int(text))
    source = InMemorySource(str(path), path, rows)
    return LabeledImages(source, [str(number) for number in range(max(labels) + 1)], labels, _keys(rows))


def _keys(rows: list[Row]) -> list[str]:
    return [row.key for row in rows]


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
