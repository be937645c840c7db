#!/usr/bin/env python3
"""The strongest control of composed scenes: a teacher that tells words apart, and knows nothing of
what they mean.

    scene_words.py DATA/all --cache DATA/cache/raw --seed 0 --output DATA/cache/words-seed0

Captions share words, and so do their embeddings of any LLM, whatever it knows. Here a caption is
the sum of random vectors, the same wherever they occur: of each name's words, of the same words at
their place in the caption, and of the relation. ``--cache`` is a teacher's, for the width.
"""

import argparse
import sys
from pathlib import Path

import torch
from gate_caches import control_identity, random_vector, write_texts
from scenes import HELD_OUT, RELATIONS, TWINS
from torch import Tensor

from llm2clip_plugin.contracts import CacheManifest

WORDS = "random vectors of words"  # the name of this control's teacher


def embed_words(caption: str, width: int, seed: int) -> Tensor:
    """(width,) the sum of the caption's words. Raises ValueError if it is not a scene's."""
    total = torch.zeros(width)
    for position, name in enumerate(names_in(caption)):
        words = name.split()[1:]  # without the article
        for word in words:
            anywhere = random_vector(f"{seed} {word}", width)
            here = random_vector(f"{seed} {position} {word}", width)
            total += (anywhere + here) / len(words) ** 0.5
    return total + random_vector(f"{seed} {relation_in(caption)}", width)


def relation_in(caption: str) -> str:
    """The relation of a scene's caption. Raises ValueError without one."""
    for relation in RELATIONS:
        if f" {relation} " in caption:
            return relation
    raise ValueError(f"{caption!r} has none of the relations {', '.join(RELATIONS)}")


def names_in(caption: str) -> list[str]:
    """Both names of a scene's caption, with their articles, in their order."""
    return caption.split(f" {relation_in(caption)} ")


def write_words(data: Path, cache: Path, output: Path, seed: int) -> None:
    """Write the cache of all scenes."""
    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    width = manifest.teacher["width"]
    identity = control_identity(manifest.teacher, WORDS, f"{WORDS} {seed}")

    def embed(text: str) -> Tensor:
        return embed_words(text, width, seed)

    splits = ("train", TWINS, *HELD_OUT)
    write_texts(data, splits, output, identity, manifest.dtype, embed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the scenes")
    parser.add_argument("--cache", type=Path, required=True, help="of a teacher")
    parser.add_argument("--seed", type=int, required=True, help="of the vectors")
    parser.add_argument("--output", type=Path, required=True, help="cache to write")
    write_words(**vars(parser.parse_args()))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
