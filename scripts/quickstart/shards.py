#!/usr/bin/env python3
"""Make the quickstart's data folders from the built-in emoji set.

    scripts/quickstart/shards.py --output quickstart-output/data [--concepts 300 60 100] [--languages de zh]

``all/``        train, validation and test shards, and the unseen style (openmoji) of validation and test
``shuffled/``   the control: training shards with the pictures of concepts exchanged. Keys and captions are the same;
                control_cache.py makes its cache from that of ``all/``.

Training and validation use names and long captions in English; keywords and other languages are for the test only.
For a short run, ``--concepts`` limits the training, validation and test concepts, and ``--languages`` the languages of
the names, in addition to English.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import atomic_directory

SCRIPTS = Path(__file__).resolve().parents[1]
EMOJI = SCRIPTS.parent / "llm2clip_plugin" / "data" / "emoji"
SPLITS = ("train", "validation", "test")
UNSEEN = "openmoji"
Description = dict[str, Any]
Sample = tuple[str, bytes, Description]  # key, png, description


@dataclass(frozen=True, kw_only=True)
class Part:
    """A subset of the built-in set."""

    concepts: tuple[int, ...] = ()  # number of training, validation and test concepts; (): all
    languages: tuple[str, ...] = ()  # of names, in addition to English; (): all

    def of(self, split: str, samples: list[Sample]) -> list[Sample]:
        """The samples and captions of a split's shard that belong to the subset."""
        concepts = self.chosen(split, {about["concept"] for _, _, about in samples})
        return [
            (key, png, {**about, "captions": [c for c in about["captions"] if self.has(split, c)]})
            for key, png, about in samples
            if about["concept"] in concepts
        ]

    def chosen(self, split: str, concepts: set[str]) -> set[str]:
        """The concepts of a split that belong to the subset: the first ones in a fixed random order."""
        if not self.concepts:
            return concepts
        return set(in_random_order(concepts, "subset")[: self.concepts[SPLITS.index(split)]])

    def of_unseen(self, split: str, descriptions: list[Description]) -> list[Description]:
        """The descriptions to draw in the unseen style; none of them for training."""
        concepts = set() if split == "train" else self.chosen(split, {about["concept"] for about in descriptions})
        return [about for about in descriptions if about["concept"] in concepts]

    def has(self, split: str, caption: dict[str, str]) -> bool:
        """Whether a split uses a caption: all use English names and long captions, the test also everything else."""
        if caption["language"] == "en" and caption["kind"] in ("short", "long"):
            return True
        return split == "test" and (not self.languages or caption["language"] in ("en", *self.languages))


def read_tar(path: Path) -> list[Sample]:
    """The samples of a shard, in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            samples.setdefault(key, {})[suffix] = read_member(tar, member)
    return [(key, parts["png"], json.loads(parts["json"])) for key, parts in samples.items()]


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a file in an archive. Raises ValueError for a folder, device or link."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{tar.name}: {member.name} is not a file")
    return file.read()


def write_tar(path: Path, samples: list[Sample]) -> None:
    """Write samples as a WebDataset shard."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, description in samples:
            for suffix, body in (("png", png), ("json", json.dumps(description, ensure_ascii=False).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def in_random_order(concepts: set[str], salt: str) -> list[str]:
    """Concepts in the order of their hashes, which is the same on every machine."""
    return sorted(concepts, key=lambda concept: hashlib.sha256(f"{salt}:{concept}".encode()).digest())


def exchange_pictures(samples: list[Sample]) -> list[Sample]:
    """Keys and captions as they are, each with the picture of another concept (the same one in every style)."""
    order = in_random_order({description["concept"] for _, _, description in samples}, "shuffle")
    partner = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle, so no concept keeps its picture
    picture = {description["concept"]: png for _, png, description in samples}
    return [(key, picture[partner[description["concept"]]], description) for key, _, description in samples]


def shipped() -> Iterator[tuple[str, Path]]:
    """(split, shard) of the built-in set."""
    for split in SPLITS:
        for path in sorted(EMOJI.glob(f"{split}-*.tar")):
            yield split, path


def draw_unseen(folder: Path, part: Part) -> str:
    """Draw the unseen style's shards into ``folder``; returns "", or why that failed."""
    sys.path.insert(0, str(SCRIPTS))
    import build_emoji

    try:
        build_emoji.build([UNSEEN], folder, folder, size=98, colors=64, choose=part.of_unseen)
    except (FileNotFoundError, ImportError) as error:
        return f"the unseen style (openmoji) is left out: {error}"
    return ""


def make_all(folder: Path, part: Part) -> str:
    """Write ``all/``; returns why the unseen style is missing, or ""."""
    with atomic_directory(folder, replace=True) as temporary:
        missing = draw_unseen(temporary, part)
        paths = [*shipped(), *((path.name.split("-")[0], path) for path in sorted(temporary.glob("*.tar")))]
        for split, path in paths:
            write_tar(temporary / path.name, part.of(split, read_tar(path)))
    return missing


def make_shuffled(everything: Path, folder: Path) -> None:
    """Write ``shuffled/`` from the training shards of ``all/``."""
    with atomic_directory(folder, replace=True) as temporary:
        for path in sorted(everything.glob("train-*.tar")):
            write_tar(temporary / path.name, exchange_pictures(read_tar(path)))


def prepare(output: Path, part: Part) -> None:
    """Make both folders, unless they exist for the same subset of the same set."""
    recipe = {
        **{name: list(values) for name, values in asdict(part).items()},
        "built_from": [path.stat().st_size for _, path in shipped()],
    }
    stamp = output / "made-for.json"
    complete = (output / "all" / f"test-{UNSEEN}.tar").is_file()
    if complete and stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return
    stamp.unlink(missing_ok=True)
    missing = make_all(output / "all", part)
    make_shuffled(output / "all", output / "shuffled")
    if missing:
        print(f"note: {missing}", file=sys.stderr)
    stamp.write_text(json.dumps(recipe), encoding="utf-8")


def main() -> None:
    """Parse the command line and make the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--concepts", type=int, nargs=3, default=[], metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--languages", nargs="+", default=[])
    options = parser.parse_args()
    prepare(options.output, Part(concepts=tuple(options.concepts), languages=tuple(options.languages)))


if __name__ == "__main__":
    main()
