"""One file per family of towers, each defining ``FAMILY``; a new file is a new family."""

from pathlib import Path
from typing import Any

from llm2clip_plugin.files import discover, errors_about
from llm2clip_plugin.options import command
from llm2clip_plugin.vision.directory import CONFIG_FILE, read_json
from llm2clip_plugin.vision.family import Family, Tower


def families() -> dict[str, Family]:
    """Every family by name."""
    return discover(__name__, "FAMILY")


def family_of_type(model_type: str, *, where: str) -> Family:
    """The family whose config.json has this ``model_type``; ``where``: for the error message."""
    known = {kind: family for family in families().values() for kind in family.model_types}
    if model_type not in known:
        raise ValueError(f"{where}: no tower family has model_type {model_type!r}; known: {', '.join(sorted(known))}")
    return known[model_type]


def family_of(tower: Tower) -> Family:
    """The family of a loaded tower."""
    return family_of_type(tower.config.model_type, where=type(tower).__name__)


def read_config(directory: Path) -> tuple[Family, Any]:
    """Family and vision configuration of a directory, an image-text model's too; ContractError if it is damaged."""
    file = directory / CONFIG_FILE
    body = read_json(file)
    if "model_type" not in body and "architecture" in body:
        raise ValueError(
            f"{file} describes a timm model; run `{command('import', directory, '--output', 'DIR')}` first"
        )
    family = family_of_type(str(body.get("model_type")), where=str(file))
    with errors_about(file, fix="copy or export the tower again"):
        return family, family.vision_class().config_class.from_pretrained(directory)
