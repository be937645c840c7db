"""The surface that LLaVA expects of a vision tower, over a tower directory.

Shape letters: B images, N patches, H hidden width, S image size in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessor

from llava_integration.towers.names import Place
from llm2clip_plugin.vision.families import read_config
from llm2clip_plugin.vision.towers import load_tower, tower_blocks

FEATURES = ("patch", "cls_patch")


class LLM2CLIPVisionTower(nn.Module):
    """A tower directory as LLaVA's ``model.vision_tower``.

    The features are bit for bit those of LLaVA's own CLIPVisionTower on the same directory. Blocks above the
    selected hidden state are dropped on load: nobody reads them. Parameters are frozen unless the
    configuration says ``unfreeze_mm_vision_tower``.
    """

    def __init__(self, name: str, place: Place, args: Any, delay_load: bool = False):
        """``name`` is what LLaVA was told; ``args`` its model arguments or configuration.

        With ``delay_load`` the weights wait for ``load_model``, while widths, patches and config are known.
        """
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = name
        self.place = place
        self.select_layer: int = args.mm_vision_select_layer
        self.select_feature: str = getattr(args, "mm_vision_select_feature", "patch")
        self.unfrozen: bool = getattr(args, "unfreeze_mm_vision_tower", False)
        self.has_cls = place.card.has_cls
        self.blocks_used = blocks_below(self.select_layer, place.card.num_layers)
        if self.select_feature not in FEATURES:
            raise ValueError(f"unknown mm_vision_select_feature {self.select_feature!r}; known: {', '.join(FEATURES)}")
        # An unfrozen tower's weights come out of LLaVA's checkpoint, so its parameters must exist by then.
        if not delay_load or self.unfrozen:
            self.load_model()
        else:
            self.cfg_only = read_config(place.directory)[1]

    def load_model(self, device_map: Any = None) -> None:
        """Read the weights, once; ``device_map`` as LLaVA passes it: None, "auto", a device, or {"": device}.

        Raises ContractError if the weights are not those of the tower's card.
        """
        if self.is_loaded:
            return
        directory = self.place.directory
        self.place.check_weights()
        self.image_processor = CLIPImageProcessor.from_pretrained(directory)
        self.vision_tower = load_tower(directory, dtype=torch.float32)
        del tower_blocks(self.vision_tower)[self.blocks_used :]
        self.vision_tower.requires_grad_(self.unfrozen)
        if (device := device_of_map(device_map)) is not None:
            self.vision_tower.to(device)
        self.is_loaded = True

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """(B, 3, S, S) -> features (B, N, H) in the images' dtype; a list of (3, S, S) -> a list of (1, N, H)."""
        if isinstance(images, list):
            return [self.features(image.unsqueeze(0)) for image in images]
        return self.features(images)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, N, hidden_size), without gradient unless a parameter of the tower asks for one."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trains):
            return self.patch_states(images).to(images.dtype)

    def patch_states(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> the selected hidden state (B, N, H), its class token kept or dropped as selected."""
        outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        states = outputs.hidden_states[self.blocks_used]
        return states[:, 1:] if self.has_cls and self.select_feature == "patch" else states

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the tower, known before the weights are read."""
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width of one feature: what LLaVA's projector gets."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, the class token not counted."""
        return self.num_patches_per_side**2

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; float32 until they are read."""
        return self.vision_tower.dtype if self.is_loaded else torch.float32

    @property
    def device(self) -> torch.device:
        """Of the weights; the CPU until they are read."""
        return self.vision_tower.device if self.is_loaded else torch.device("cpu")

    @property
    def dummy_feature(self) -> torch.Tensor:
        """(1, hidden_size) zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def blocks_below(select_layer: int, num_layers: int) -> int:
    """How many blocks make the selected hidden state: 24 blocks have 25 states, so -2 is the one after 23.

    Raises ValueError if there is no such state.
    """
    states = num_layers + 1
    if not -states <= select_layer < states:
        raise ValueError(
            f"there is no hidden state {select_layer} (mm_vision_select_layer): "
            f"a tower of {num_layers} blocks has {-states} to {states - 1}"
        )
    return select_layer % states


def device_of_map(device_map: Any) -> Any:
    """The one device of a device map; a tower is small enough for one. None leaves the weights where they are.

    Raises ValueError for a map that splits the tower.
    """
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError(
                f"the vision tower goes to one device, got the device map {device_map}; pass {{'': device}}"
            )
        return device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return device_map
