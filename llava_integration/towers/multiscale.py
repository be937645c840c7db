"""S2: one tower applied at several scales (Shi et al. 2024, "When Do We Not Need Larger Vision Models?").

Enabled, as in LLaVA's repository, by ``s2: true`` and ``s2_scales: "336,672,1008"`` in the configuration. The image is
resized to each scale and cut into tiles of the first scale; the tower encodes every tile; the tiles' features are
stitched together, averaged down to the first scale's grid and concatenated along the width.

Shape letters: B images, N patches of the first scale, H hidden width, S image size in pixels, G patches along a side.
"""

from typing import Any

import torch
from torch.nn import functional as F

from llava_integration.towers.location import TowerLocation
from llava_integration.towers.tower import LLM2CLIPVisionTower

DEFAULT_SCALES = "336,672,1008"


class MultiscaleVisionTower(LLM2CLIPVisionTower):
    """Features of every scale, concatenated: (B, N, H x scales)."""

    def __init__(self, name: str, location: TowerLocation, args: Any, delay_load: bool = False):
        """Raises ValueError unless the first scale is the tower's image size and the others are multiples of it."""
        self.scales = parse_scales(getattr(args, "s2_scales", DEFAULT_SCALES), location.card.image_size)
        super().__init__(name, location, args, delay_load)
        if self.select_feature != "patch":
            raise ValueError(f"s2 needs mm_vision_select_feature 'patch', got {self.select_feature!r}")

    def load_model(self, device_map: Any = None) -> None:
        """Read the weights, and let the image processor resize to the largest scale."""
        super().load_model(device_map)
        largest = self.scales[-1]
        self.image_processor.size = {"shortest_edge": largest}
        self.image_processor.crop_size = {"height": largest, "width": largest}

    def patch_states(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) at any size -> (B, N, H x scales)."""
        grids = [self.grid_at(images, scale) for scale in self.scales]
        side = self.num_patches_per_side
        # In float32: averaging in half precision rounds every patch.
        joined = [F.interpolate(grid.float(), size=(side, side), mode="area").to(grid.dtype) for grid in grids]
        return torch.cat(joined, dim=1).flatten(2).transpose(1, 2)

    def grid_at(self, images: torch.Tensor, scale: int) -> torch.Tensor:
        """(B, 3, S, S) -> features (B, H, G, G) of the image at ``scale`` pixels, encoded in tiles."""
        tile, tiles = self.scales[0], scale // self.scales[0]
        resized = F.interpolate(images.float(), size=(scale, scale), mode="bicubic").to(images.dtype)
        batch = resized.shape[0]
        cut = resized.reshape(batch, 3, tiles, tile, tiles, tile).permute(2, 4, 0, 1, 3, 5)
        states = super().patch_states(cut.reshape(tiles * tiles * batch, 3, tile, tile))
        side = self.num_patches_per_side
        grid = states.reshape(tiles, tiles, batch, side, side, -1).permute(2, 5, 0, 3, 1, 4)
        return grid.reshape(batch, -1, tiles * side, tiles * side)

    @property
    def hidden_size(self) -> int:
        """Width of one feature over all scales."""
        return self.config.hidden_size * len(self.scales)


def parse_scales(text: str, image_size: int) -> list[int]:
    """``"336,672"`` -> [336, 672], sorted. Raises ValueError unless they are ``image_size`` and multiples of it."""
    try:
        scales = sorted(int(part) for part in str(text).split(","))
    except ValueError as error:
        raise ValueError(
            f"s2_scales {text!r} is not a comma-separated list of sizes, such as {DEFAULT_SCALES!r}"
        ) from error
    if scales[0] != image_size or any(scale % image_size for scale in scales):
        fit = ",".join(str(image_size * factor) for factor in (1, 2, 3))
        raise ValueError(f"s2_scales {text!r} must be the tower's {image_size} px and multiples of it; try {fit!r}")
    return scales
