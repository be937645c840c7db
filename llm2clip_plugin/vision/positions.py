"""Learned position tables: the image size that they are for, and interpolation to another grid of patches.

Shapes: C width, g side of the old grid, G side of the new one, c class rows (0 or 1).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def check_pixels(pixel_values: Tensor, image_size: int) -> None:
    """ValueError unless images (B, 3, S, S) have the size in pixels that the positions are for."""
    if pixel_values.shape[-2:] != (image_size, image_size):
        raise ValueError(
            f"images have {tuple(pixel_values.shape[-2:])} pixels, but the tower expects {image_size} x {image_size}; "
            "interpolate its positions with load_tower(..., image_size=N)"
        )


def resize_positions(table: Tensor, *, class_rows: int, old_grid: int, new_grid: int) -> Tensor:
    """Interpolate the patch rows and keep the class rows: (..., c + g*g, C) -> (..., c + G*G, C).

    ``interpolate(size=..., mode="bicubic", align_corners=False)`` without antialias, in float32: what LLM2CLIP's
    reference does when it loads a checkpoint at 224 into a model at 336, and transformers 5 does for DINOv2.
    Raises ValueError if the number of rows does not match ``old_grid``.
    """
    rows = table.shape[-2]
    if rows != class_rows + old_grid**2:
        raise ValueError(
            f"the position table has {rows} rows, expected {class_rows} + {old_grid} x {old_grid}; "
            "check image_size and patch_size in config.json"
        )
    if new_grid == old_grid:
        return table
    flat = table.reshape(rows, table.shape[-1])
    patches = rearrange(flat[class_rows:].float(), "(h w) c -> 1 c h w", h=old_grid)
    patches = F.interpolate(patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    patches = rearrange(patches, "1 c h w -> (h w) c").to(table.dtype)
    resized = torch.cat((flat[:class_rows], patches))
    return resized.reshape(*table.shape[:-2], *resized.shape)
