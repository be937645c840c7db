"""Pictures of the questions, read from the benchmarks' folders and embedded into the report as small JPEGs.

They are below ``--image-folder``, or in the folder that was scored, if its annotations are still those that were
scored: a score file from elsewhere must not bring another picture of this machine into a page that is passed on. So
those of a benchmark without a rule need ``--image-folder``; an item's ``image`` is a path relative to that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_integration.benchmarks.base import Item
from llava_integration.benchmarks.benchmark import find_image
from llava_integration.benchmarks.rules import benchmarks
from llava_integration.compare.sides import Side
from llm2clip_plugin.contracts import sha256_text
from llm2clip_plugin.thumbnails import thumbnail

IMAGE_FOLDERS = ("", "images")  # below the folder of a benchmark without a rule


class Pictures:
    """Data URIs by key; questions about one picture share it."""

    def __init__(self, sides: Sequence[Side], root: Path | None, *, enabled: bool):
        self.encoded: dict[str, str] = {}
        self.missing: dict[str, int] = {}
        self._enabled = enabled
        self._benchmarks = benchmarks()
        self._folders = {
            name: _folders(name, root, [record.provenance for side in sides for record in side.runs.get(name, ())])
            for name in {name for side in sides for name in side.runs}
        }
        if root is not None and not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root} for --image-folder; pass LLaVA's playground/data/eval or one of its folders"
            )

    def key(self, name: str, item: Item) -> str:
        """The key of an item's picture, "" if there is none; encodes it at first use."""
        if not self._enabled or not item.get("image"):
            return ""
        key = f"{name}/{item['image']}"
        if key not in self.encoded:
            encoded = thumbnail(self._read(name, item))
            if encoded is None:
                self.missing[name] = self.missing.get(name, 0) + 1
                return ""
            self.encoded[key] = encoded
        return key

    def _read(self, name: str, item: Item) -> bytes | None:
        known = self._benchmarks.get(name)
        for folder in self._folders[name]:
            if known:
                image = known.image_bytes(folder, item)
            else:
                path = find_image(IMAGE_FOLDERS, folder, str(item["image"]))
                image = path.read_bytes() if path else None
            if image is not None:
                return image
        return None

    def notes(self) -> list[str]:
        """How many pictures were not found."""
        return [
            f"{count} pictures of {name} were not found; pass their folder with --image-folder"
            for name, count in sorted(self.missing.items())
        ]


def _folders(name: str, root: Path | None, scored: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Folders to search for a benchmark's pictures: below --image-folder, else the data that were scored."""
    known = benchmarks().get(name)
    if root is not None:
        below = [root / folder for folder in (known.folders if known else ())]
        return [folder for folder in (*below, root) if folder.is_dir()]
    if known is None:
        return []
    folders = {Path(str(one.get("data"))): one.get("data_sha256") for one in scored if one.get("data")}
    nothing = sha256_text("")  # of a folder without annotations
    return [
        folder
        for folder, digest in folders.items()
        if folder.exists() and nothing != digest == known.data_digest(folder)
    ]
