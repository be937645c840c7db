"""``llm2clip llava bundle CHECKPOINT``: copy the tower into a LLaVA checkpoint, so that they move together."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_integration.towers import names
from llava_integration.towers.location import TowerLocation
from llava_integration.towers.provenance import BUNDLE, KEY, find_tower, tower_record
from llm2clip_plugin.contracts import ContractError, TowerCard, atomic_directory, atomic_file
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.outside.values import read_json_value

CONFIG = "config.json"
FILES = (  # of a tower directory, as patterns
    CONFIG,
    TowerCard.FILE,
    "checksums.json",
    "model*.safetensors",
    "text_adapter.safetensors",
    "preprocessor_config.json",
    "README.md",
    "*.py",
)


def bundle(checkpoint: Path, *, tower: str = "", overwrite: bool = False) -> Path:
    """Copy the checkpoint's tower to ``CHECKPOINT/vision_tower`` and return that folder.

    The tower is the one that loading the checkpoint finds, or ``tower`` (path, registered name or Hub id). A checkpoint
    without a record of its tower gets one. Raises ContractError if that is not the tower that the checkpoint was
    trained with, FileExistsError if another tower is bundled already and ``overwrite`` is false.
    """
    if not (checkpoint / CONFIG).is_file():
        raise FileNotFoundError(f"{checkpoint} is not a LLaVA checkpoint: no {CONFIG} in it")
    config = read_json_value(checkpoint / CONFIG)
    if not isinstance(config, dict):
        raise ContractError(f"{checkpoint / CONFIG} contains a {type(config).__name__}, expected an object")
    name = str(config.get("mm_vision_tower"))
    if not names.is_ours(name):
        raise ContractError(
            f"{checkpoint} was trained with the vision tower {name!r}, which is not a tower of this package and "
            "cannot be bundled"
        )
    location = locate_tower(checkpoint, name, config, tower)
    target = checkpoint / BUNDLE
    if already_bundled(target, location):
        return target
    with atomic_directory(target, replace=overwrite) as temporary:
        for source in tower_files(location.directory):
            shutil.copyfile(source, temporary / source.name)
        replace(location, directory=temporary).check_weights()
    if KEY not in config:
        config[KEY] = tower_record(location, name, config["mm_hidden_size"])
        with atomic_file(checkpoint / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def tower_files(directory: Path) -> list[Path]:
    """The files of a tower directory, of those that are there.

    Raises ContractError for a link that leads out of it, other than to a blob of the Hub's cache (snapshots/REVISION).
    """
    files = [path for name in FILES for path in sorted(directory.glob(name)) if path.is_file()]
    inside = (directory.resolve(), directory.resolve().parents[1] / "blobs")
    for path in files:
        if path.resolve().parent not in inside:
            raise ContractError(f"{path} is a link to {path.resolve()}, outside the tower's folder; copy the file")
    return files


def locate_tower(checkpoint: Path, name: str, config: dict[str, Any], tower: str) -> TowerLocation:
    """The tower at ``tower``, or else the one that loading the checkpoint finds.

    Raises ContractError with both hashes if ``tower`` is not the one that the checkpoint was trained with.
    """
    if not tower:
        return find_tower(name, SimpleNamespace(**{**config, "_name_or_path": str(checkpoint)}))
    location = names.locate_spec(tower, how=f"--tower {tower}")
    recorded = config.get(KEY, {}).get("weights_sha256", location.sha256)
    if location.sha256 != recorded:
        raise ContractError(
            f"{checkpoint} was trained with the tower sha256 {recorded}, "
            f"but {location.directory} has sha256 {location.sha256}; pass the original with --tower"
        )
    return location


def already_bundled(target: Path, location: TowerLocation) -> bool:
    """Whether ``target`` is that tower already; raises ContractError if so but its weights are damaged."""
    if not (target / TowerCard.FILE).is_file():
        return False
    bundled = TowerLocation.of(target, how="bundled")
    if bundled.sha256 != location.sha256:
        return False
    bundled.check_weights()
    return True


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Checkpoints that get their tower."""

    checkpoints: tuple[Path, ...]  # folders with config.json
    tower: str = ""  # path, registered name or Hub id of the tower, if the checkpoint cannot find it
    overwrite: bool = False  # replace a different tower that is already bundled


COMMAND = Command(
    name="llava bundle",
    example="llm2clip llava bundle checkpoints/llava-7b-llm2clip",
    about="Copy the vision tower into LLaVA checkpoints, so that they load on another machine.",
    settings=BundleConfig,
    arguments="checkpoints",
    shown={"checkpoints": "checkpoint"},
)


def main(argv: list[str]) -> int:
    """Copy the vision tower into LLaVA checkpoints, so that they load on another machine."""
    options = COMMAND.parse(argv)
    for checkpoint in options.checkpoints:
        target = bundle(checkpoint, tower=options.tower, overwrite=options.overwrite)
        print(f"{target}: sha256 {TowerCard.read(target / TowerCard.FILE).weights_sha256}")
    return 0
