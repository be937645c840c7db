"""Image preprocessing of a tower, as a CLIPImageProcessor's configuration, which is what LLaVA reads."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from llm2clip_plugin.outside.values import ContractError
from llm2clip_plugin.vision.directory import PREPROCESSOR_FILE, fetch_directory, read_json
from llm2clip_plugin.vision.families import family_of, read_config
from llm2clip_plugin.vision.family import Tower

INHERITED = ("image_mean", "image_std", "resample")  # from the source's own preprocessor_config.json
UNNORMALIZED = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}


def own_preprocessor(directory: Path) -> dict[str, Any]:
    """Mean, standard deviation and resampling in a directory's preprocessor_config.json; {} without one.

    Pixels that are not normalized (``do_normalize`` false: RADIO does that itself) have mean 0 and deviation 1.
    """
    if not (directory / PREPROCESSOR_FILE).is_file():
        return {}
    body = read_json(directory / PREPROCESSOR_FILE)
    own = {name: body[name] for name in INHERITED if name in body}
    return own | (UNNORMALIZED if body.get("do_normalize") is False else {})


def check_crop(directory: Path, image_size: int) -> None:
    """Raise ContractError unless a tower directory's preprocessor_config.json, which LLaVA uses as it is, crops images
    to the tower's size."""
    path = directory / PREPROCESSOR_FILE
    body = read_json(path)
    for name in ("crop_size", "size"):
        sizes = body.get(name)
        values = set(sizes.values()) if isinstance(sizes, dict) else {sizes}
        if values != {image_size}:
            raise ContractError(
                f"{path}: {name} is {sizes}, but the tower's images have {image_size} pixels a side; copy or export "
                "the tower again"
            )


def preprocessor_config(source: Tower | str | os.PathLike[str]) -> dict[str, Any]:
    """preprocessor_config.json for a tower or a tower directory.

    Mean, standard deviation and resampling are those of the source's own file or configuration, else the family's; the
    crop is the tower's image size, because SigLIP's and DINOv2's own files have no ``crop_size`` or another size.
    """
    if isinstance(source, nn.Module):
        tower: Tower = source
        family, config, own = family_of(tower), tower.config, getattr(tower, "own_preprocessor", {})
    else:
        directory = fetch_directory(source)
        (family, config), own = read_config(directory), own_preprocessor(directory)
    own = {name: value for name, value in config.to_dict().items() if name in INHERITED and value} | own
    size = config.image_size
    return {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        "crop_size": {"height": size, "width": size},
        "image_mean": list(own.get("image_mean", family.mean)),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(own.get("image_std", family.std)),
        "resample": own.get("resample", 3),  # PIL's bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
