#!/usr/bin/env python3
"""The quickstart's data folders, made from the built-in set.

    scripts/quickstart/shards.py --output quickstart-output/data [--concepts 300 60 100] [--languages de zh]

``all/``        train, validation and test shards, and the unseen style (openmoji) of validation and test, drawn here
``shuffled/``   the training shards with the pictures of concepts exchanged: the control. Keys and captions stay, so
                the teacher's cache of ``all/`` fits it.

Training and validation have names and long captions in English; what else the built-in set has is for the test alone.
``--concepts`` keeps the first so many training, validation and test concepts, ``--languages`` the names in English and
these languages alone: for a short run.
"""

from __future__ import annotations

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

from llm2clip_plugin.contracts import whole_directory

SCRIPTS = Path(__file__).resolve().parents[1]
EMOJI = SCRIPTS.parent / "llm2clip_plugin" / "data" / "emoji"
SPLITS = ("train", "validation", "test")
UNSEEN = "openmoji"
Description = dict[str, Any]
Sample = tuple[str, bytes, Description]  # key, png, description


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of the built-in set is used."""

    concepts: tuple[int, ...] = ()  # training, validation and test concepts; (): all
    languages: tuple[str, ...] = ()  # of names, beside English; (): all

    def of(self, split: str, samples: list[Sample]) -> list[Sample]:
        """The samples of a split's shard that belong to it, with the captions that do."""
        kept = self.chosen(split, {about["concept"] for _, _, about in samples})
        return [
            (key, png, {**about, "captions": [c for c in about["captions"] if self.has(split, c)]})
            for key, png, about in samples
            if about["concept"] in kept
        ]

    def chosen(self, split: str, concepts: set[str]) -> set[str]:
        """Those of a split's concepts that belong to it: the first so many in random order."""
        if not self.concepts:
            return concepts
        return set(in_random_order(concepts, "subset")[: self.concepts[SPLITS.index(split)]])

    def of_unseen(self, split: str, descriptions: list[Description]) -> list[Description]:
        """What is drawn of the unseen style, which is only ever a test."""
        kept = set() if split == "train" else self.chosen(split, {about["concept"] for about in descriptions})
        return [about for about in descriptions if about["concept"] in kept]

    def has(self, split: str, caption: dict[str, str]) -> bool:
        """Names and long captions in English; keywords and other languages are for the test alone."""
        if caption["language"] == "en" and caption["kind"] in ("short", "long"):
            return True
        return split == "test" and (not self.languages or caption["language"] in ("en", *self.languages))


def read_tar(path: Path) -> list[Sample]:
    """The samples of one of the built-in set's shards, in order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return [(key, parts["png"], json.loads(parts["json"])) for key, parts in found.items()]


def write_tar(path: Path, samples: list[Sample]) -> None:
    """Write samples as a WebDataset shard."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, description in samples:
            for suffix, body in (("png", png), ("json", json.dumps(description, ensure_ascii=False).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def in_random_order(concepts: set[str], salt: str) -> list[str]:
    """Concepts in the order of a hash: the same on every machine."""
    return sorted(concepts, key=lambda concept: hashlib.sha256(f"{salt}:{concept}".encode()).digest())


def exchange_pictures(samples: list[Sample]) -> list[Sample]:
    """The same keys and captions, each with the picture of another concept, the same one in every style."""
    order = in_random_order({description["concept"] for _, _, description in samples}, "shuffle")
    partner = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: no concept keeps its own
    picture = {description["concept"]: png for _, png, description in samples}
    return [(key, picture[partner[description["concept"]]], description) for key, _, description in samples]


def shipped() -> Iterator[tuple[str, Path]]:
    """(split, shard) of the built-in set."""
    for split in SPLITS:
        for path in sorted(EMOJI.glob(f"{split}-*.tar")):
            yield split, path


def draw_unseen(folder: Path, part: Part) -> str:
    """Draw the unseen style's shards into ``folder``; returns why not, or "" if it could be done."""
    sys.path.insert(0, str(SCRIPTS))
    import build_emoji

    try:
        build_emoji.build([UNSEEN], folder, folder, size=98, colours=64, choose=part.of_unseen)
    except (FileNotFoundError, ImportError) as error:
        return f"no unseen style: {error}"
    return ""


def make_all(folder: Path, part: Part) -> str:
    """Fill ``all/``; returns why the unseen style is missing, or ""."""
    with whole_directory(folder, replace=True) as aside:
        missing = draw_unseen(aside, part)
        paths = [*shipped(), *((path.name.split("-")[0], path) for path in sorted(aside.glob("*.tar")))]
        for split, path in paths:
            write_tar(aside / path.name, part.of(split, read_tar(path)))
    return missing


def make_shuffled(everything: Path, folder: Path) -> None:
    """Fill ``shuffled/`` from the training shards of ``all/``."""
    with whole_directory(folder, replace=True) as aside:
        for path in sorted(everything.glob("train-*.tar")):
            write_tar(aside / path.name, exchange_pictures(read_tar(path)))


def prepare(output: Path, part: Part) -> None:
    """Make both folders, unless they are there for the same part of the same set."""
    recipe = {
        **{name: list(values) for name, values in asdict(part).items()},
        "built_from": [path.stat().st_size for _, path in shipped()],
    }
    stamp = output / "made-for.json"
    whole = (output / "all" / f"test-{UNSEEN}.tar").is_file()
    if whole and stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return
    stamp.unlink(missing_ok=True)
    missing = make_all(output / "all", part)
    make_shuffled(output / "all", output / "shuffled")
    if missing:
        print(f"note: {missing}", file=sys.stderr)
    stamp.write_text(json.dumps(recipe), encoding="utf-8")


def main() -> None:
    """Command line; see the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/data"))
    parser.add_argument("--concepts", type=int, nargs=3, default=[], metavar=("TRAIN", "VALIDATION", "TEST"))
    parser.add_argument("--languages", nargs="+", default=[])
    options = parser.parse_args()
    prepare(options.output, Part(concepts=tuple(options.concepts), languages=tuple(options.languages)))


if __name__ == "__main__":
    main()
