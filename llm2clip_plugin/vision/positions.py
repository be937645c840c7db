"""Learned position tables: the image size that they are for, and the way to another patch grid.

Shapes: C width, g side of the old grid, G side of the new one, c class rows (0 or 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def check_pixels(pixel_values: Tensor, image_size: int) -> None:
    """ValueError unless images (B, 3, S, S) have the size in pixels that a tower's positions are for."""
    if pixel_values.shape[-2:] != (image_size, image_size):
        raise ValueError(
            f"images of {tuple(pixel_values.shape[-2:])} pixels, the tower runs at {image_size}; "
            "load_tower(..., image_size=N) interpolates the positions"
        )


def resize_positions(table: Tensor, *, class_rows: int, old_grid: int, new_grid: int) -> Tensor:
    """Bicubic resize of the patch rows, class rows kept: (..., c + g*g, C) -> (..., c + G*G, C).

    ``interpolate(size=..., mode="bicubic", align_corners=False)`` without antialias, in float32: what LLM2CLIP's
    reference does on loading (a checkpoint at 224 into a model at 336), and transformers 5 for DINOv2.
    Raises ValueError if the table's rows are not those of ``old_grid``.
    """
    rows = table.shape[-2]
    if rows != class_rows + old_grid**2:
        raise ValueError(
            f"a position table of {rows} rows, expected {class_rows} + {old_grid} x {old_grid}; "
            "is image_size or patch_size in the config that of these weights?"
        )
    if new_grid == old_grid:
        return table
    flat = table.reshape(rows, table.shape[-1])
    patches = rearrange(flat[class_rows:].float(), "(h w) c -> 1 c h w", h=old_grid)
    patches = F.interpolate(patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    patches = rearrange(patches, "1 c h w -> (h w) c").to(table.dtype)
    resized = torch.cat((flat[:class_rows], patches))
    return resized.reshape(*table.shape[:-2], *resized.shape)
