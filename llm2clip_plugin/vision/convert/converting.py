"""Convert a tower directory to another format."""

import os
from pathlib import Path

from llm2clip_plugin.contracts import TowerCard, atomic_directory
from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.vision.convert.formats import formats
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import load_dual
from llm2clip_plugin.vision.preprocessor import preprocessor_config
from llm2clip_plugin.vision.towers import load_tower


def convert(
    source: str | os.PathLike[str], output: str | os.PathLike[str], format_name: str, *, replace: bool = False
) -> Path:
    """Write the tower directory ``source`` to ``output`` in another format; returns the directory.

    Raises ValueError for an unknown format or one that cannot represent the tower, ContractError if the written files
    give other features.
    """
    known = formats()
    if format_name not in known:
        raise ValueError(unknown("format", format_name, ["tower", *known]))
    directory = fetch_directory(source)
    card = TowerCard.read(directory / TowerCard.FILE)
    model = load_dual(directory)[0] if card.projection_dim else load_tower(directory)
    with atomic_directory(output, replace=replace) as temporary:
        known[format_name].write(model.eval(), temporary, preprocessor_config(directory))
    return Path(output)
