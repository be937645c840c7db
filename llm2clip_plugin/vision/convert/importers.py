"""Existing vision checkpoints into tower directories: ``llm2clip import SOURCE --output DIR``.

A source is a tower directory of this package (llm2clip.json), any of the layouts of ``layouts.py``, or ``timm:NAME``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llm2clip_plugin.contracts import ContractError, TowerCard
from llm2clip_plugin.vision.convert.checkpoints import PICKLE_SUFFIXES
from llm2clip_plugin.vision.convert.layouts import Parsed, parse, report
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder, beside_tower_state, load_dual
from llm2clip_plugin.vision.export import export_tower, reexport
from llm2clip_plugin.vision.family import Tower
from llm2clip_plugin.vision.model_card import summary
from llm2clip_plugin.vision.towers import (
    TIMM_PREFIX,
    fetch_directory,
    load_tower,
    preprocessor_config,
    read_json,
    resize_tower,
)


def import_tower(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    replace: bool = False,
) -> tuple[TowerCard, list[str]]:
    """Write ``source`` (file, directory or Hub id) as a tower directory; return its card and a report in lines.

    ``config``: a config.json (Hugging Face's, EVA-CLIP's or OpenCLIP's) where the source has none and its
    tensors don't say enough, or keys that go over those of the source's own. ``image_size`` other than the source's
    interpolates the positions, as the card records.
    Raises FileNotFoundError, ValueError (architecture unknown), ContractError (a tensor without a place, missing,
    misshapen; a file that is truncated or holds code).
    """
    if str(source).startswith(TIMM_PREFIX):
        return _import_timm(str(source), output, config=config, image_size=image_size, replace=replace)
    path = Path(source).expanduser()
    place = path if path.is_file() else fetch_directory(source)
    if place.is_dir() and (place / TowerCard.FILE).is_file():
        return _import_own(place, output, image_size=image_size, replace=replace)
    parsed = parse(place, None if config is None else read_json(Path(config)))
    card = export_tower(
        dual_of(parsed, source=str(source), image_size=image_size, beside=Path(output).resolve().parent),
        output,
        origin=path.name if path.exists() else str(source),
        training={"imported_as": parsed.format},
        preprocessor=parsed.preprocessor,
        replace=replace,
    )
    return card, [*report(parsed), *_interpolated(card)]


def _import_timm(
    source: str,
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None,
    image_size: int | None,
    replace: bool,
) -> tuple[TowerCard, list[str]]:
    """A timm model by name, with timm's pretrained weights; ValueError for a ``config``, which timm has itself."""
    if config is not None:
        raise ValueError(f"{source} is described by timm: leave --config out")
    tower = load_tower(source, image_size=image_size)
    card = export_tower(tower, output, origin=source, training={"imported_as": "timm"}, replace=replace)
    return card, [f"read as timm: {len(tower.state_dict())} tensors of the tower", *_interpolated(card)]


def _interpolated(card: TowerCard) -> list[str]:
    """The line of a report that says so where a tower's positions were interpolated."""
    old = card.training.get("resized_from")
    return [] if old is None else [f"positions interpolated from {old} to {card.image_size} px"]


def dual_of(parsed: Parsed, *, source: str, beside: Path, image_size: int | None = None) -> torch.nn.Module:
    """A parsed checkpoint as a dual encoder, or as a tower alone if nothing else is in it.

    ``beside``: folder for temporary files of the tower's size. ``source`` is named in errors.
    """
    tower = _build_tower(parsed, source=source, image_size=image_size, beside=beside)
    return _with_projection(tower, parsed, source=source)


def _build_tower(parsed: Parsed, *, source: str, image_size: int | None, beside: Path) -> Tower:
    """A tower from parsed tensors, through the same strict loading as any tower directory."""
    from safetensors.torch import save_file

    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".import-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(parsed.config), encoding="utf-8")
        tensors = {name: value.contiguous().clone() for name, value in parsed.tower.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        try:
            return load_tower(folder, image_size=image_size)
        except ContractError as error:
            raise ContractError(str(error).replace(folder, source)) from error


def _with_projection(tower: Tower, parsed: Parsed, *, source: str) -> torch.nn.Module:
    """The tower with what lies beside it; the tower alone if there is neither projection, adapter nor scale."""
    adapter = parsed.adapter
    if parsed.projection is None and adapter is None and parsed.logit_scale is None:
        return tower
    if parsed.projection is not None and parsed.projection.shape[-1] != tower.config.hidden_size:
        shape, inputs = tuple(parsed.projection.shape), tower.config.hidden_size
        raise ContractError(
            f"{source}: the visual projection is {shape}, expected (projection_dim, {inputs}): transposed?"
        )
    width = tower.config.hidden_size if parsed.projection is None else parsed.projection.shape[0]
    if adapter is not None and adapter.projection_dim != width:
        raise ContractError(
            f"{source}: image features are {width} wide, the text adapter gives {adapter.projection_dim}"
        )
    config = DualConfig(
        projection_dim=width,
        llm_width=adapter.llm_width if adapter is not None else 0,
        projection="none" if parsed.projection is None else "linear",
        projection_bias=parsed.projection_bias is not None,
        adapter_blocks=adapter.blocks if adapter is not None else 4,
        adapter_expansion=adapter.expansion if adapter is not None else 2,
        normalise_input=adapter is None or adapter.normalise_input,
        logit_bias_init=None if parsed.logit_bias is None else float(parsed.logit_bias.reshape(()).item()),
    )
    dual = DualEncoder(tower, config)
    state = {f"text_adapter.{name}": value for name, value in (adapter.state if adapter is not None else {}).items()}
    for name, value in (("weight", parsed.projection), ("bias", parsed.projection_bias)):
        if value is not None:
            state[f"visual_projection.{name}"] = value
    for name, value in (("logit_scale", parsed.logit_scale), ("logit_bias", parsed.logit_bias)):
        if value is not None:
            state[name] = value.reshape(1)
    _load_beside(dual, state, source=source)
    return dual


def _load_beside(dual: DualEncoder, state: dict[str, Tensor], *, source: str) -> None:
    """Load what lies beside the tower; only the logit scale may be missing (then it is CLIP's initial one)."""
    own = beside_tower_state(dual)
    missing = sorted(set(own) - set(state) - {"logit_scale"})
    wrong = sorted(name for name in state if name not in own or state[name].shape != own[name].shape)
    if missing or wrong:
        raise ContractError(f"{source}: beside the tower, missing {missing}, unknown or misshapen {wrong}")
    dual.load_state_dict(state, strict=False)  # the tower's own tensors are loaded already; the rest was just checked


def _import_own(
    directory: Path, output: str | os.PathLike[str], *, image_size: int | None, replace: bool
) -> tuple[TowerCard, list[str]]:
    """A tower directory of this package: written again, or resized on request."""
    card = TowerCard.read(directory / TowerCard.FILE)
    if image_size in (None, card.image_size):
        return reexport(directory, output, replace=replace), ["a tower directory: the same weights, checked"]
    if card.projection_dim:
        model: torch.nn.Module = load_dual(directory)[0]
        model.tower = resize_tower(model.tower, image_size)
    else:
        model = load_tower(directory, image_size=image_size)
    resized = export_tower(
        model,
        output,
        origin=card.origin,
        teacher=card.teacher,
        training=card.training,
        metrics={},  # measured at the other size
        preprocessor=preprocessor_config(directory),
        replace=replace,
    )
    return resized, [f"a tower directory: positions interpolated from {card.image_size} to {image_size} px"]


def main(argv: list[str]) -> int:
    """``llm2clip import SOURCE --output DIR [--config FILE] [--image-size N]``."""
    parser = argparse.ArgumentParser(
        prog="llm2clip import", description="Turn an existing vision checkpoint into a tower directory."
    )
    parser.add_argument(
        "source", help=f"directory, Hub id, timm:NAME or file (.safetensors, {', '.join(PICKLE_SUFFIXES)})"
    )
    parser.add_argument("--output", required=True, help="tower directory to write")
    parser.add_argument("--config", help="config.json where the source has none; its keys go over one's that is there")
    parser.add_argument("--image-size", type=int, help="interpolate the positions to this size in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    options = parser.parse_args(argv)
    card, lines = import_tower(
        options.source,
        options.output,
        config=options.config,
        image_size=options.image_size,
        replace=options.overwrite,
    )
    print("\n".join(lines))
    print(summary(options.output, card))
    return 0
