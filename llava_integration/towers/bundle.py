"""``llm2clip llava bundle CHECKPOINT``: put the tower into a LLaVA checkpoint, so that it travels with it."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_integration.towers import names, provenance
from llava_integration.towers.names import Place
from llm2clip_plugin.contracts import ContractError, TowerCard, whole_directory, whole_file

CONFIG = "config.json"


def bundle(checkpoint: Path, *, tower: str = "", overwrite: bool = False) -> Path:
    """Copy the checkpoint's tower to ``CHECKPOINT/vision_tower`` and return that folder.

    The tower is looked for as on load; ``tower`` (path, known name or Hub id) says where it is instead. A checkpoint
    without a record of its tower gets one. Raises ContractError if the tower found is not the one that the checkpoint
    was trained with, FileExistsError if another tower is bundled already and ``overwrite`` is false.
    """
    config = read_config(checkpoint)
    name = str(config.get("mm_vision_tower"))
    if not names.is_ours(name):
        raise ContractError(f"{checkpoint} was trained with the vision tower {name!r}, which is none of this package's")
    place = find(checkpoint, name, config, tower)
    target = checkpoint / provenance.BUNDLE
    if already_bundled(target, place):
        return target
    with whole_directory(target, replace=overwrite) as aside:
        copy_tower(place, aside)
    if provenance.KEY not in config:
        config[provenance.KEY] = provenance.record_of(place, name, config["mm_hidden_size"])
        with whole_file(checkpoint / CONFIG) as aside:
            aside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a LLaVA checkpoint (full, LoRA or projector alone); FileNotFoundError if there is none."""
    if not (checkpoint / CONFIG).is_file():
        raise FileNotFoundError(f"{checkpoint} is no LLaVA checkpoint: it holds no {CONFIG}")
    return json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))


def find(checkpoint: Path, name: str, config: dict[str, Any], tower: str) -> Place:
    """The tower of the checkpoint, from where ``tower`` says or else where the load would find it."""
    if not tower:
        return provenance.find(name, SimpleNamespace(**{**config, "_name_or_path": str(checkpoint)}))
    place = names.locate_spec(tower, how=f"--tower {tower}")
    wanted = config.get(provenance.KEY, {}).get("weights_sha256", place.card.weights_sha256)
    if place.card.weights_sha256 != wanted:
        raise ContractError(
            f"{checkpoint} was trained with the tower sha256 {wanted}, "
            f"{place.directory} has sha256 {place.card.weights_sha256}"
        )
    return place


def already_bundled(target: Path, place: Place) -> bool:
    """Whether ``target`` holds that tower; ContractError if it does but is damaged."""
    if not (target / TowerCard.FILE).is_file():
        return False
    there = names.place_of(target, how="bundled")
    if there.card.weights_sha256 != place.card.weights_sha256:
        return False
    there.check_weights()
    return True


def copy_tower(place: Place, target: Path) -> None:
    """Copy the files of a tower directory (links followed) and hold the copy to its card."""
    for source in sorted(place.directory.iterdir()):
        if source.is_file() and not source.name.startswith("."):
            shutil.copyfile(source, target / source.name)
    replace(place, directory=target).check_weights()


def main(argv: list[str]) -> int:
    """``llm2clip llava bundle``: put the tower into LLaVA checkpoints, so that they load on another machine."""
    parser = argparse.ArgumentParser(prog="llm2clip llava bundle", description=main.__doc__)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="folder with config.json")
    parser.add_argument("--tower", default="", help="where the tower is, if not where the checkpoint says")
    parser.add_argument("--overwrite", action="store_true", help="replace another tower that is bundled already")
    options = parser.parse_args(argv)
    for checkpoint in options.checkpoints:
        target = bundle(checkpoint, tower=options.tower, overwrite=options.overwrite)
        print(f"{target}: sha256 {TowerCard.read(target / TowerCard.FILE).weights_sha256}")
    return 0
