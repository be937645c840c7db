"""Images with a class label: ImageNet's folders, tars with .cls members, or a field of a dataset's JSON."""

from abc import ABC, abstractmethod
from pathlib import Path

from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.data.sources.tar_scan import scan_tar, split_name

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
NOT_A_CLASS = (".", "embeddings-")  # prefixes of other folders: hidden ones, the prompts' cache


class LabeledImages(ABC):
    """N images, each with a key and a label: the index of its class in ``classes``."""

    def __init__(self, name: str, classes: list[str], keys: list[str], labels: list[int], clusters: list[str]) -> None:
        if not keys:
            raise ValueError(f"{name} contains no images")
        self.name = name
        self.classes = classes  # the data's own names: folders, values of the field, or the numbers in .cls members
        self.keys = keys
        self.labels = labels
        self.clusters = clusters  # resampled together in the bootstrap, held out together

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def image(self, number: int) -> bytes:
        """The image file's bytes. Raises BrokenSample if it is missing."""


class FolderImages(LabeledImages):
    """``CLASS/**/IMAGE.jpg``; classes in alphabetical order of their folders."""

    def __init__(self, path: Path) -> None:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(NOT_A_CLASS))
        files = [(label, file) for label, folder in enumerate(folders) for file in sorted(folder.rglob("*"))]
        images = [(label, file) for label, file in files if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS]
        self.files = [file for _, file in images]
        keys = [str(file.relative_to(path)) for file in self.files]
        super().__init__(str(path), [folder.name for folder in folders], keys, [label for label, _ in images], keys)

    def image(self, number: int) -> bytes:
        try:
            return self.files[number].read_bytes()
        except OSError as error:
            raise BrokenSample(self.name, self.keys[number], f"cannot read the file: {error.strerror}") from error


class TarImages(LabeledImages):
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index as text."""

    def __init__(self, path: Path) -> None:
        tars = [path] if path.is_file() else sorted(path.rglob("*.tar"))
        keys, labels = [], []
        self.members: list[tuple[Path, int, int]] = []  # tar, offset, size
        for tar in tars:
            parts: dict[str, dict[str, tuple[int, int]]] = {}
            for member in scan_tar(tar):
                key, ending = split_name(member.name)
                part = "image" if ending in IMAGE_ENDINGS else ending
                parts.setdefault(key, {})[part] = (member.offset_data, member.size)
            for key, of_key in parts.items():
                if "image" in of_key:
                    keys.append(f"{tar.stem}/{key}")
                    labels.append(self._label(tar, key, of_key))
                    self.members.append((tar, *of_key["image"]))
        classes = [str(number) for number in range(max(labels, default=-1) + 1)]
        super().__init__(str(path), classes, keys, labels, keys)

    @staticmethod
    def _label(tar: Path, key: str, parts: dict[str, tuple[int, int]]) -> int:
        if "cls" not in parts:
            raise ValueError(f"{tar}: sample {key} has no .cls member with its class index")
        text = _read(tar, *parts["cls"]).decode("utf-8", "replace").strip()
        if not text.isdecimal():
            raise ValueError(f"{tar}: {key}.cls contains {text!r}, expected a class index (0, 1, ...)")
        return int(text)

    def image(self, number: int) -> bytes:
        return _read(*self.members[number])


class FieldImages(LabeledImages):
    """Any captioned data source; ``field`` and ``cluster`` are fields of each sample's JSON."""

    def __init__(self, source: Source, field: str, cluster: str = "") -> None:
        self.source = source
        keys, values, clusters = [], [], []
        for number in range(len(source)):
            record = source.record(number)
            for name in filter(None, (field, cluster)):
                if name not in record.meta:
                    known = ", ".join(sorted(record.meta)) or "none"
                    raise ValueError(f"{source.path}: {record.key!r} has no field {name!r} in its JSON; known: {known}")
            keys.append(record.key)
            values.append(str(record.meta[field]))
            clusters.append(str(record.meta[cluster]) if cluster else record.key)
        classes = sorted(set(values))
        number_of = {value: number for number, value in enumerate(classes)}
        super().__init__(source.path, classes, keys, [number_of[value] for value in values], clusters)

    def image(self, number: int) -> bytes:
        return self.source.record(number, image=True).read_image()


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls or class folders.

    Raises FileNotFoundError, or ValueError for another layout.
    """
    if field:
        return FieldImages(open_source(SourceConfig(path=path)), field, cluster)
    root = Path(path)
    if root.is_file() or any(root.rglob("*.tar")):
        return TarImages(root)
    if any(entry.is_dir() for entry in root.iterdir()):
        return FolderImages(root)
    raise ValueError(
        f"{path} has no class folders and no tars with .cls members; for captioned data pass --label FIELD"
    )


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
