"""Existing vision checkpoints into tower directories: ``llm2clip import SOURCE --output DIR``."""

from __future__ import annotations

import argparse
import os

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.export import export_tower, reexport
from llm2clip_plugin.vision.towers import fetch_directory, load_tower, preprocessor_config


def import_tower(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    replace: bool = False,
) -> TowerCard:
    """Write ``source`` (a Hugging Face directory or Hub id) as a tower directory and return its card.

    ``image_size`` other than the source's interpolates the positions, which the card records.
    """
    directory = fetch_directory(source)
    if (directory / TowerCard.FILE).is_file() and image_size is None:
        return reexport(directory, output, replace=replace)
    tower = load_tower(directory, image_size=image_size)
    return export_tower(tower, output, origin=str(source), preprocessor=preprocessor_config(directory), replace=replace)


def main(argv: list[str]) -> int:
    """``llm2clip import SOURCE --output DIR``."""
    parser = argparse.ArgumentParser(
        prog="llm2clip import", description="Turn a vision checkpoint into a tower directory."
    )
    parser.add_argument("source", help="directory or Hub id")
    parser.add_argument("--output", required=True, help="tower directory to write")
    parser.add_argument("--image-size", type=int, help="interpolate the positions to this size in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    options = parser.parse_args(argv)
    card = import_tower(options.source, options.output, image_size=options.image_size, replace=options.overwrite)
    print(f"{options.output}: {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256}")
    return 0
