"""What a tower expects of an image, and how an image is prepared for evaluation.

Shapes: S side of the tower's image in pixels, B batch. Pixels are RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm2clip_plugin.data.decode import decode
from llm2clip_plugin.options.names import unknown

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's own numbers
FITS = ("shortest", "squash")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a tower expects of an image, as in its preprocessor_config.json."""

    size: int = 224  # pixels, side of the tower's square image
    resize: int = 0  # pixels, shortest edge before the center crop; 0: size
    fit: str = "shortest"  # shortest: keep the aspect ratio and crop the center; squash: stretch to the square
    resample: str = "bicubic"  # nearest | lanczos | bilinear | bicubic | box | hamming
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # RGB, for values in 0 .. 1; CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # RGB, for values in 0 .. 1; CLIP's

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize and self.resize < self.size):
            raise ValueError(
                f"image size {self.size} and resize {self.resize}: size must be at least 1 and at most resize (if set)"
            )
        if self.fit not in FITS:
            raise ValueError(unknown("fit", self.fit, FITS))
        if self.resample not in RESAMPLE:
            raise ValueError(unknown("resample", self.resample, RESAMPLE))

    @property
    def shortest_edge(self) -> int:
        """Pixels of the shorter side before the center crop."""
        return self.resize or self.size

    @classmethod
    def from_preprocessor(cls, values: dict[str, Any]) -> ImageConfig:
        """From a Hugging Face image processor's dictionary (CLIP, SigLIP, DINOv2's BitImageProcessor ...).

        Raises ValueError for settings that this class does not support.
        """
        crop = bool(values.get("do_center_crop", "crop_size" in values and values["crop_size"] is not None))
        edge, height, width = _sides(values.get("size"), "size")
        if values.get("do_resize", True) is False or values.get("do_pad"):
            raise ValueError(
                "preprocessor has do_resize false or do_pad true, so its images have no fixed size; not supported"
            )
        if not math.isclose(float(values.get("rescale_factor", 1 / 255)), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"preprocessor has rescale_factor {values['rescale_factor']}; expected 1/255")
        if height != width:
            raise ValueError(f"preprocessor has size {height} x {width}; expected a square")
        normalize = values.get("do_normalize", True)
        common = {
            "resample": _resample_name(values.get("resample", 3)),
            "mean": _triple(values.get("image_mean", cls.mean)) if normalize else (0.0, 0.0, 0.0),
            "std": _triple(values.get("image_std", cls.std)) if normalize else (1.0, 1.0, 1.0),
        }
        if edge and not crop:
            raise ValueError(f"preprocessor keeps the aspect ratio (shortest_edge {edge}) but has no center crop")
        if not crop:
            return cls(size=height, fit="squash", **common)
        _, crop_height, crop_width = _sides(values.get("crop_size"), "crop_size")
        if crop_height != crop_width:
            raise ValueError(f"preprocessor has crop_size {crop_height} x {crop_width}; expected a square")
        if not edge and height != crop_height:
            raise ValueError(f"preprocessor stretches to {height} and crops to {crop_height}, which is not supported")
        if not edge:
            return cls(size=crop_height, fit="squash", **common)
        return cls(size=crop_height, resize=0 if edge == crop_height else edge, **common)


def _sides(value: Any, name: str) -> tuple[int, int, int]:
    """(shortest edge or 0, height, width) from a preprocessor's size, a number or a mapping."""
    if isinstance(value, int):
        return (value, value, value)
    if isinstance(value, dict) and "shortest_edge" in value:
        return (value["shortest_edge"],) * 3
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        return (0, value["height"], value["width"])
    raise ValueError(f"preprocessor has {name} {value!r}; expected a number, shortest_edge, or height and width")


def _resample_name(number: Any) -> str:
    for name, known in RESAMPLE.items():
        if known == int(number):
            return name
    raise ValueError(f"preprocessor has resample {number!r}; known: {RESAMPLE}")


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


class Normalize:
    """uint8 pixels -> (value / 255 - mean) / std, on a device: images travel there as bytes."""

    def __init__(self, config: ImageConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.shift = torch.tensor(config.mean, device=device).view(1, 3, 1, 1) * 255
        self.scale = 1 / (255 * torch.tensor(config.std, device=device).view(1, 3, 1, 1))

    def __call__(self, pixels_BSS3: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8, wherever it lies -> (B, 3, S, S) float32 on the device."""
        values = pixels_BSS3.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return values.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.shift).mul_(self.scale)


class EvalTransform:
    """Resize, center crop and normalize, with the same values as the tower's Hugging Face processor."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        self.normalize = Normalize(config)

    def __call__(self, data: bytes) -> torch.Tensor:
        """(3, S, S) float32. Raises BrokenImage."""
        return self.normalize(torch.from_numpy(self.pixels(data))[None])[0]

    def pixels(self, data: bytes) -> np.ndarray:
        """(S, S, 3) uint8. Raises BrokenImage."""
        image = decode(data)
        side, resample = self.config.size, RESAMPLE[self.config.resample]
        if self.config.fit == "squash":
            return np.array(image.resize((side, side), resample))
        edge, short, long = self.config.shortest_edge, min(image.size), max(image.size)
        stretched = int(edge * long / short)  # Hugging Face rounds down
        size = (edge, stretched) if image.width <= image.height else (stretched, edge)
        image = image.resize(size, resample)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return np.array(image.crop((left, top, left + side, top + side)))
