"""A tower directory with the interface that LLaVA expects of a vision tower.

Shape letters: B images, N patches, H hidden width, S image size in pixels.
"""

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from llava_integration.plug.checkpoints import blocks_below, check_feature, is_unfrozen
from llava_integration.plug.towers import TowerLocation
from llm2clip_plugin.vision.families import read_config
from llm2clip_plugin.vision.parts import tower_blocks
from llm2clip_plugin.vision.towers import load_tower, print_once

# On PIL, as in transformers 4: the default of transformers 5, on torchvision, differs by 1/255 in
# some pixels
IMAGE_PROCESSOR: Any = (
    getattr(transformers, "CLIPImageProcessorPil", None)
    or transformers.CLIPImageProcessor
)


class LLM2CLIPVisionTower(nn.Module):
    """A tower directory as LLaVA's ``model.vision_tower``.

    Its features equal those of LLaVA's own CLIPVisionTower on the same directory bit for bit.
    Blocks above the selected hidden state are deleted on load. Parameters are frozen unless
    `is_unfrozen`.
    """

    def __init__(
        self, name: str, location: TowerLocation, args: Any, delay_load: bool = False
    ):
        """``args``: LLaVA's configuration or model arguments; with ``delay_load``, ``load_model``
        reads the weights. Raises ValueError for an unknown ``mm_vision_select_feature`` or a
        ``mm_vision_select_layer`` out of range."""
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = name
        self.location = location
        self.select_layer: int = args.mm_vision_select_layer
        self.select_feature: str = getattr(args, "mm_vision_select_feature", "patch")
        self.unfrozen = is_unfrozen(args)
        self.has_cls = location.card.has_cls
        self.blocks_used = blocks_below(self.select_layer, location.card.num_layers)
        check_feature(self.select_feature)
        if self.select_feature == "cls_patch" and not self.has_cls:
            print_once(
                f"note: mm_vision_select_feature cls_patch: the states of {name} "
                f"({location.card.family}) have no class token; its features are the patches alone"
            )
        # LLaVA's checkpoint contains the weights of an unfrozen tower: its parameters must exist
        # when they are loaded.
        if not delay_load or self.unfrozen:
            self.load_model()
        else:
            self.cfg_only = read_config(location.directory)[1]

    def load_model(self, device_map: Any = None) -> None:
        """Read the weights; a second call does nothing. ``device_map``: None, "auto", a device, or
        {"": device}. Raises ContractError if the weights do not match the tower's card."""
        if self.is_loaded:
            return
        directory = self.location.directory
        self.image_processor = IMAGE_PROCESSOR.from_pretrained(directory)
        self.vision_tower = load_tower(directory, dtype=torch.float32)
        # one block stays for layer 0, its input: transformers collects no states without blocks
        del tower_blocks(self.vision_tower)[max(self.blocks_used, 1) :]
        self.vision_tower.requires_grad_(self.unfrozen)
        if (device := device_of_map(device_map)) is not None:
            self.vision_tower.to(device)
        self.is_loaded = True

    def train(self, mode: bool = True) -> "LLM2CLIPVisionTower":
        """A frozen tower stays in eval mode: in training mode DINOv3 is random, and the projector
        would learn noise."""
        return super().train(mode and is_trained(self))

    def forward(self, images: Any) -> Any:
        """(B, 3, S, S) -> features (B, N, H) in the images' dtype; a list of (3, S, S) -> a list of
        (1, N, H). Without gradient if every parameter of the tower is frozen."""
        if isinstance(images, list):
            return [self.forward(image.unsqueeze(0)) for image in images]
        needs_gradient = torch.is_grad_enabled() and is_trained(self.vision_tower)
        with torch.set_grad_enabled(needs_gradient):
            return self.patch_states(images).to(images.dtype)

    def patch_states(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> the selected hidden state (B, N, H); without its class token if ``patch``
        is selected."""
        outputs = self.vision_tower(
            images.to(device=self.device, dtype=self.dtype), output_hidden_states=True
        )
        states = outputs.hidden_states[self.blocks_used]
        if self.has_cls and self.select_feature == "patch":
            return states[:, 1:]
        return states

    @property
    def config(self) -> Any:
        """The Hugging Face configuration, available before the weights are read."""
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def hidden_size(self) -> int:
        """Width of a patch's feature, the input width of LLaVA's projector."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, without the class token."""
        return self.num_patches_per_side**2

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; float32 before they are read."""
        return self.vision_tower.dtype if self.is_loaded else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU before they are read."""
        return self.vision_tower.device if self.is_loaded else torch.device("cpu")

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros, (1, hidden_size)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def device_of_map(device_map: Any) -> Any:
    """The device that a device map puts the tower on; None: the weights stay. ValueError for a map
    that splits it."""
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError(
                f"the vision tower cannot be split over devices ({device_map}); pass {{'': device}}"
            )
        return device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        if not torch.cuda.is_available():
            return None
        return torch.device("cuda", torch.cuda.current_device())
    return device_map


# S2: one tower applied at several scales (Shi et al. 2024, "When Do We Not Need Larger Vision
# Models?").

DEFAULT_SCALES = "336,672,1008"


class MultiscaleVisionTower(LLM2CLIPVisionTower):
    """Features of every scale, concatenated: (B, N, H x scales)."""

    def __init__(
        self, name: str, location: TowerLocation, args: Any, delay_load: bool = False
    ):
        """Raises ValueError unless the first scale is the tower's image size and the others are
        multiples of it."""
        self.scales = parse_scales(
            getattr(args, "s2_scales", DEFAULT_SCALES), location.card.image_size
        )
        super().__init__(name, location, args, delay_load)
        if self.select_feature != "patch":
            raise ValueError(
                f"s2 needs mm_vision_select_feature 'patch', got {self.select_feature!r}"
            )

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
        averaged = []
        for grid in grids:
            # In float32: averaging in half precision rounds every patch.
            cells = F.interpolate(grid.float(), size=(side, side), mode="area")
            averaged.append(cells.to(grid.dtype))
        return torch.cat(averaged, dim=1).flatten(2).transpose(1, 2)

    def grid_at(self, images: torch.Tensor, scale: int) -> torch.Tensor:
        """(B, 3, S, S) -> features (B, H, G, G) of the image at ``scale`` pixels, encoded in
        tiles."""
        tile = self.scales[0]
        tiles = scale // tile  # of a row and of a column
        resized = F.interpolate(images.float(), size=(scale, scale), mode="bicubic")
        batch = resized.shape[0]
        rows = resized.to(images.dtype).reshape(batch, 3, tiles, tile, tiles, tile)
        cut = rows.permute(2, 4, 0, 1, 3, 5)
        states = super().patch_states(cut.reshape(tiles * tiles * batch, 3, tile, tile))
        side = self.num_patches_per_side
        grids = states.reshape(tiles, tiles, batch, side, side, -1)
        joined = grids.permute(2, 5, 0, 3, 1, 4)
        return joined.reshape(batch, -1, tiles * side, tiles * side)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size * len(self.scales)


def parse_scales(text: str, image_size: int) -> list[int]:
    """``"336,672"`` -> [336, 672], sorted. Raises ValueError unless they are ``image_size`` and
    multiples of it."""
    scales = sorted(map(int, str(text).split(",")))
    if scales[0] != image_size or any(scale % image_size for scale in scales):
        fit = ",".join(str(image_size * factor) for factor in (1, 2, 3))
        raise ValueError(
            f"s2_scales {text!r} must be the tower's {image_size} px and multiples of it; "
            f"try {fit!r}"
        )
    return scales
