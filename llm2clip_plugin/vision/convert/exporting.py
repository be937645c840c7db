"""What a format that towers are converted to consists of, and checks that formats share."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llm2clip_plugin.contracts import TowerCard, atomic_directory
from llm2clip_plugin.options import unknown
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.convert.formats import formats
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower

# Convert a tower directory to another format.


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


OTHER = "--format onnx converts every tower, and the tower directory itself opens with transformers' AutoModel"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format for other software."""

    name: str
    help: str  # for `llm2clip export --help`
    write: Callable[[nn.Module, Path, dict[str, Any]], None]  # model, directory, preprocessor; verifies what it wrote


def projected_dual(model: nn.Module, format_name: str, families: tuple[str, ...]) -> DualEncoder:
    """The dual encoder, if the format can represent it: a pooled token, then one matrix; else ValueError."""
    if not isinstance(model, DualEncoder):
        raise ValueError(
            f"format {format_name!r} requires a projection, but this directory contains only a tower; {OTHER}"
        )
    family, config = family_of(model.tower).name, model.config
    if family not in families:
        raise ValueError(f"format {format_name!r} supports {', '.join(families)} towers, not {family}; {OTHER}")
    # pooled and cls are the same except in SigLIP, whose own models have no projection
    pools, projections = (("pooled",), ("linear", "none")) if family == "siglip" else (("pooled", "cls"), ("linear",))
    if config.pool not in pools or config.projection not in projections or config.projection_norm:
        raise ValueError(
            f"format {format_name!r} requires pool {' or '.join(pools)}, projection {' or '.join(projections)} and no "
            f"projection_norm; this tower has pool {config.pool!r}, projection {config.projection!r}, "
            f"projection_norm {config.projection_norm}; {OTHER}"
        )
    if config.projection_bias and family != "eva02":
        raise ValueError(f"format {format_name!r} has no projection bias for {family} towers, but this tower has one")
    return model
