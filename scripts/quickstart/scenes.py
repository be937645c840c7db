#!/usr/bin/env python3
"""Composed scenes: two drawings in one picture, with a caption that no other picture has, as
"a red apple left of a clock".

    scenes.py --output DATA [--scenes 2000] [--concepts 240]

A random vector per caption has nothing that two scenes share; a teacher that reads captions has. So
scenes ask whether a tower learns the parts from wholes. All splits show the same concepts, but each
pair of concepts is in one split alone. A scene of validation or test has a twin: the same drawings,
exchanged, with their names exchanged in the caption. The training scenes have none; in their place
a tower can be trained on as many pictures of half of their pairs, each scene with its twin.

Writes ``train-scenes.tar``, ``twins-NNN.tar`` (training with twins), ``validation-scenes.tar`` and
``test-scenes.tar`` below ``--output``, the same on every machine. ``concept`` of a sample is its
scene, ``family`` its pair of concepts. scenes.sh trains towers on them, and scene_scores.py asks
these.
"""

import argparse
import io
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inputs import Sample, in_random_order, write_tar
from miniature_data import emoji
from PIL import Image

from llm2clip_plugin.atomic import atomic_directory

SIDE = 112  # pixels of a scene, which the tower's preprocessing scales
DRAWING = SIDE // 2  # pixels of a drawing in it
RELATIONS = ("left of", "above")  # of the first drawing to the second
STYLES = ("noto", "twemoji", "fluent")  # both drawings of a scene have one style
GROUPS = (
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
HELD_OUT = ("validation", "test")
PARTS = ("given", "swapped")  # of a scene and its twin, at the end of their names
TWINS = "twins"  # the split of training with twins
# pictures of one of its shards, a divisor of the quickstart's batch: shards that are read one after
# the other bring a scene and its twin into one batch
TWINS_SHARD = 16

Pair = tuple[str, str]  # of concepts, in their order


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and its caption."""

    name: str
    pair: Pair  # sorted, the same for a scene and its twin
    first: str  # the concept that is left of the other, or above it
    second: str
    relation: str
    style: str
    shift: int  # pixels by which both leave the middle, each to another side


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """What scenes are made of."""

    names: dict[str, str]  # concept -> what a caption calls it
    images: dict[tuple[str, str], Image.Image]  # (concept, style) -> a drawing


def read_drawings(count: int) -> Drawings:
    """``count`` concepts of things, each of another family, drawn in every style."""
    samples = usable(emoji("train"))
    order = in_random_order(samples, "scenes")
    if len(order) < count:
        raise ValueError(f"--concepts {count}: only {len(order)} can be used")
    chosen = set(order[:count])
    names = {}
    images = {}
    for _, png, about in samples:
        concept = about["concept"]
        if concept in chosen:
            names[concept] = about["english"]["short"]
            image = Image.open(io.BytesIO(png)).convert("RGB")
            size = (DRAWING, DRAWING)
            images[concept, about["style"]] = image.resize(
                size, Image.Resampling.BICUBIC
            )
    return Drawings(names=names, images=images)


def usable(samples: Sequence[Sample]) -> list[Sample]:
    """The drawings of things with a name of one or two words in the singular, the first concept of
    each family."""
    concept_of: dict[str, str] = {}  # family -> concept
    kept = []
    for sample in samples:
        about = sample[2]
        name = about["english"]["short"]
        in_words = re.fullmatch("[a-z]+( [a-z]+)?", name)
        is_plural = name.endswith("s") and not name.endswith("ss")
        if about["group"] not in GROUPS or not in_words or is_plural:
            continue
        concept = concept_of.setdefault(about["family"], about["concept"])
        if concept == about["concept"]:
            kept.append(sample)
    return kept


def split_pairs(concepts: Sequence[str], scenes: int) -> dict[str, list[Pair]]:
    """Split -> pairs of concepts, none of which is in two splits. In validation and test each
    concept is in one pair, so that no two pairs have anything in common."""
    draw = random.Random(0)
    order = sorted(concepts)
    taken: set[Pair] = set()
    pairs: dict[str, list[Pair]] = {}
    for split in HELD_OUT:
        pairs[split] = matching(order, taken, draw)
        taken.update(pairs[split])
    possible = len(order) * (len(order) - 1) // 2 - len(taken)
    if scenes > possible:
        raise ValueError(f"--scenes {scenes}: {len(order)} concepts allow {possible}")
    training: list[Pair] = []
    while len(training) < scenes:
        pair = in_order(*draw.sample(order, 2))
        if pair not in taken:
            taken.add(pair)
            training.append(pair)
    return {"train": training, **pairs}


def matching(
    concepts: Sequence[str], taken: set[Pair], draw: random.Random
) -> list[Pair]:
    """All concepts in random pairs, none of which is taken."""
    while True:
        order = draw.sample(concepts, len(concepts))
        pairs = list(map(in_order, order[::2], order[1::2]))
        if not taken.intersection(pairs):
            return pairs


def in_order(one: str, other: str) -> Pair:
    return (one, other) if one < other else (other, one)


def training_scenes(pairs: Sequence[Pair]) -> Iterator[Scene]:
    """One scene a pair, which stands in any order."""
    for number, pair in enumerate(pairs):
        draw = random.Random(f"train {number}")
        first, second = draw.sample(pair, 2)
        yield Scene(
            name=f"train-{number:04}",
            pair=pair,
            first=first,
            second=second,
            relation=draw.choice(RELATIONS),
            style=draw.choice(STYLES),
            shift=random_shift(draw),
        )


def twin_scenes(split: str, pairs: Sequence[Pair]) -> Iterator[Scene]:
    """A scene and its twin for each pair and relation."""
    for number, pair in enumerate(pairs):
        for relation in RELATIONS:
            draw = random.Random(f"{split} {number} {relation}")
            name = f"{split}-{number:03}-{relation.replace(' ', '-')}"
            yield from with_twin(name, pair, relation, draw)


def training_twins(pairs: Sequence[Pair]) -> Iterator[Scene]:
    """A scene and its twin for each pair."""
    for number, pair in enumerate(pairs):
        draw = random.Random(f"{TWINS} {number}")
        relation = draw.choice(RELATIONS)
        yield from with_twin(f"{TWINS}-{number:04}", pair, relation, draw)


def with_twin(
    name: str, pair: Pair, relation: str, draw: random.Random
) -> Iterator[Scene]:
    """A scene and its twin, whose names begin with ``name``."""
    style = draw.choice(STYLES)
    shift = random_shift(draw)
    for part, (first, second) in zip(PARTS, (pair, pair[::-1]), strict=True):
        yield Scene(
            name=f"{name}-{part}",
            pair=pair,
            first=first,
            second=second,
            relation=relation,
            style=style,
            shift=shift,
        )


def random_shift(draw: random.Random) -> int:
    return draw.randint(-DRAWING // 4, DRAWING // 4)


def caption(scene: Scene, names: dict[str, str]) -> str:
    """As "a cat left of an owl"."""
    first = with_article(names[scene.first])
    second = with_article(names[scene.second])
    return f"{first} {scene.relation} {second}"


def with_article(name: str) -> str:
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def picture(scene: Scene, drawings: Drawings) -> bytes:
    """A PNG: the first drawing left of the second, or above it, on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    middle = (SIDE - DRAWING) // 2
    along = (0, SIDE - DRAWING)
    across = (middle + scene.shift, middle - scene.shift)
    concepts = (scene.first, scene.second)
    for concept, start, shifted in zip(concepts, along, across, strict=True):
        corner = (start, shifted) if scene.relation == "left of" else (shifted, start)
        image.paste(drawings.images[concept, scene.style], corner)
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()


def describe(scene: Scene, names: dict[str, str]) -> dict[str, Any]:
    """The sample's JSON."""
    text = caption(scene, names)
    return {
        "concept": scene.name,
        "family": "+".join(scene.pair),
        "style": scene.style,
        "captions": [{"text": text, "kind": "short", "language": "en"}],
    }


def twin_of(name: str) -> str:
    """The name of a scene's twin."""
    scene, _, part = name.rpartition("-")
    if part not in PARTS:
        raise ValueError(f"{name} has no twin: it does not end in {' or '.join(PARTS)}")
    other = PARTS[1] if part == PARTS[0] else PARTS[0]
    return f"{scene}-{other}"


def make_scenes(output: Path, scenes: int, concepts: int) -> None:
    """Write the shards of all splits."""
    drawings = read_drawings(concepts)
    pairs = split_pairs(list(drawings.names), scenes)
    shards = {"train-scenes": list(training_scenes(pairs["train"]))}
    for split in HELD_OUT:
        shards[f"{split}-scenes"] = list(twin_scenes(split, pairs[split]))
    twins = list(training_twins(pairs["train"][: scenes // 2]))
    for number, start in enumerate(range(0, len(twins), TWINS_SHARD)):
        shards[f"{TWINS}-{number:03}"] = twins[start : start + TWINS_SHARD]
    with atomic_directory(output, replace=True) as temporary:
        for shard, in_shard in shards.items():
            samples = []
            for scene in in_shard:
                png = picture(scene, drawings)
                samples.append((scene.name, png, describe(scene, drawings.names)))
            write_tar(temporary / f"{shard}.tar", samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--scenes", type=int, default=2000, help="of training")
    parser.add_argument("--concepts", type=int, default=240, help="an even number")
    make_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
