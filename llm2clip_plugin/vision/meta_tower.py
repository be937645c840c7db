"""A tower of a known architecture without a checkpoint: on torch's meta device for plans, or with random weights."""

from pathlib import Path

import torch

from llm2clip_plugin.vision.families import families, read_config
from llm2clip_plugin.vision.family import Tower
from llm2clip_plugin.vision.towers import TIMM_PREFIX, check_size, resize_tower


def meta_tower(source: str, *, image_size: int | None = None) -> Tower:
    """A tower's modules on the meta device, nothing downloaded; arguments and errors as ``new_tower``'s."""
    return new_tower(source, image_size=image_size, device="meta")


def new_tower(source: str, *, image_size: int | None = None, device: str = "cpu") -> Tower:
    """A tower with the random weights that its library gives it, from torch's generator, in float32.

    ``source``: a tower directory (its config.json), one of the families' ``shapes``, or ``timm:NAME``. Raises
    ValueError for anything else, FileNotFoundError for a directory without config.json.
    """
    if source.startswith(TIMM_PREFIX):
        from llm2clip_plugin.vision.timm_tower import timm_tower

        # not built on the meta device: timm reads the rates of stochastic depth from tensors while it builds a model
        tower = timm_tower(source.removeprefix(TIMM_PREFIX), pretrained=False)
        if image_size and image_size != tower.config.image_size:
            tower = resize_tower(tower, image_size)
        return tower.to(device)
    shapes = {name: (family, shape) for family in families().values() for name, shape in family.shapes.items()}
    if (directory := Path(source).expanduser()).is_dir():
        family, config = read_config(directory)
    elif source in shapes:
        family, shape = shapes[source]
        config = family.vision_class().config_class(**shape)
    else:
        raise ValueError(
            f"{source!r} is neither a tower directory nor a known architecture; known: {', '.join(shapes)}, timm:NAME"
        )
    if image_size:
        check_size(config, image_size)
        config.image_size = image_size
    with torch.device(device):
        return family.vision_class()(config)
