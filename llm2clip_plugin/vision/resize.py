"""A tower for images of another size, and the check that every image has the tower's size."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from llm2clip_plugin.vision.families import Tower, family_of
from llm2clip_plugin.vision.parts import core_prefix


def resize_tower(tower: Tower, image_size: int) -> Tower:
    """A copy of a tower for another image size in pixels, with interpolated positions.

    ``config.resized_from`` records the size that the positions were learned at, for the card.
    Raises ValueError if the size is not a multiple of the patch size.
    """
    family = family_of(tower)
    config = copy.deepcopy(tower.config)
    check_size(config, image_size)
    old_size = config.image_size
    config.image_size = image_size
    config.resized_from = resized_from(tower) or old_size
    state = tower.state_dict()
    name = core_prefix(tower) + family.positions
    rows = config.to_dict().get("position_class_rows", int(family.has_cls))
    # some timm models have no table, or interpolate it
    if family.positions and name in state and rows >= 0:
        old_grid = old_size // config.patch_size
        new_grid = image_size // config.patch_size
        state[name] = resize_positions(
            state[name], class_rows=rows, old_grid=old_grid, new_grid=new_grid
        )
    resized = type(tower)(config).to(device=tower.device, dtype=tower.dtype)
    try:
        resized.load_state_dict(state)
    except RuntimeError as error:
        message = (
            f"{config.model_type} cannot be resized by interpolating its position table alone: "
            f"{error}"
        )
        raise ValueError(message) from error
    check_calls(resized)
    resized.own_preprocessor = getattr(tower, "own_preprocessor", {})
    return resized.train(tower.training)


def resize_positions(
    table: Tensor, *, class_rows: int, old_grid: int, new_grid: int
) -> Tensor:
    """Interpolate the patch rows and keep the class rows: (..., c + g*g, C) -> (..., c + G*G, C).

    Bicubic without antialias, in float32, as LLM2CLIP's reference does from 224 to 336 pixels, and
    transformers 5 for DINOv2. Raises ValueError if the number of rows does not match ``old_grid``.
    """
    rows = table.shape[-2]
    if rows != class_rows + old_grid**2:
        raise ValueError(
            f"the position table has {rows} rows, expected {class_rows} + {old_grid} x {old_grid}"
        )
    if new_grid == old_grid:
        return table
    flat = table.reshape(rows, table.shape[-1])
    patches = rearrange(flat[class_rows:].float(), "(h w) c -> 1 c h w", h=old_grid)
    patches = F.interpolate(
        patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False
    )
    patches = rearrange(patches, "1 c h w -> (h w) c").to(table.dtype)
    resized = torch.cat((flat[:class_rows], patches))
    return resized.reshape(*table.shape[:-2], *resized.shape)


def check_calls(tower: Tower) -> None:
    """Let every forward pass compare the images with the tower's size, and the states with the
    images; ValueError."""
    tower.register_forward_pre_hook(_check_images, with_kwargs=True)
    tower.register_forward_hook(_check_states, with_kwargs=True)


def _check_images(tower: Tower, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """DINOv2 would interpolate its positions silently, and differently in each version of
    transformers."""
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    side = tower.config.image_size
    if pixels.dim() == 3 and getattr(tower.config, "keeps_aspect", False):  # patches
        if "spatial_shapes" not in kwargs:
            raise ValueError(
                f"patches {tuple(pixels.shape)} require spatial_shapes=..., as of the same "
                "processor"
            )
    elif pixels.shape[-2:] != (side, side):
        sizes = (
            f"{tuple(pixels.shape[-2:])} pixels, but the tower expects {side} x {side}"
        )
        raise ValueError(
            f"images have {sizes}; interpolate its positions with load_tower(..., image_size=N)"
        )


def _check_states(
    tower: Tower, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """A state with another number of tokens has no class token, or one that its family does not
    know of: every patch would be taken for its neighbor."""
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    if pixels.dim() == 3:
        patches = pixels.shape[1]
    else:
        height, width = pixels.shape[-2:]
        rows = height // tower.config.patch_size
        columns = width // tower.config.patch_size
        patches = rows * columns
    class_tokens = int(family_of(tower).has_cls)
    for number, state in enumerate(getattr(output, "hidden_states", None) or ()):
        tokens = state.shape[1]
        if tokens != class_tokens + patches:
            raise ValueError(
                f"hidden state {number} of {type(tower).__name__} has {tokens} tokens, "
                f"expected {class_tokens} class tokens and {patches} patches: "
                "its blocks see other tokens than the family's states leave out"
            )


def check_size(config: Any, image_size: int) -> None:
    """ValueError if ``image_size`` is not a multiple of the patch size, or 0."""
    if image_size < config.patch_size or image_size % config.patch_size:
        patches = max(1, image_size // config.patch_size)
        size = patches * config.patch_size
        raise ValueError(
            f"image_size {image_size} is not a multiple of the patch size {config.patch_size}; try "
            f"{size}"
        )


def resized_from(tower: Tower) -> int:
    """The image size that the tower's positions were learned at if they were interpolated, else
    0."""
    return tower.config.to_dict().get("resized_from", 0)
