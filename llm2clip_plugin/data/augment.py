"""Training images: a random crop, resized, perhaps mirrored and rotated.

Shapes: S side of the tower's image in pixels. Pixels are RGB.
"""

import math
import random
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llm2clip_plugin.data.augment_config import AugmentConfig
from llm2clip_plugin.data.decode import load, open_header, shrink_factor
from llm2clip_plugin.data.images import RESAMPLE, ImageConfig, Normalize

LARGE = 1 << 16  # pixels of a crop (256 x 256) above which rounding its box to whole pixels is negligible


class TrainTransform:
    """A random crop, resized, mirrored and rotated as configured. Equal rngs give equal pixels."""

    def __init__(self, config: ImageConfig, augment: AugmentConfig | None = None) -> None:
        self.config = config
        self.augment = augment or AugmentConfig()
        self.normalize = Normalize(config)

    def __call__(self, data: bytes, rng: random.Random) -> torch.Tensor:
        """(3, S, S) float32. Raises BrokenImage."""
        return self.normalize(torch.from_numpy(self.pixels(data, rng))[None])[0]

    def pixels(self, data: bytes, rng: random.Random) -> np.ndarray:
        """(S, S, 3) uint8. Raises BrokenImage."""
        side = self.config.size
        image = open_header(data)
        full = image.size
        left, top, width, height = random_crop(full, self.augment, rng)
        mirrored = self.augment.flip and rng.random() < 0.5
        angle = rng.uniform(-self.augment.rotate, self.augment.rotate) if self.augment.rotate else 0.0
        needed = side * self.augment.decode_margin
        factor = shrink_factor((width, height), (needed, needed))
        image = load(image, factor)
        if image.size == full:
            factor = 1  # not a JPEG
        box = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        pixels_SS3 = resize_box(image, box, side, self.config.resample)
        if mirrored:
            pixels_SS3 = np.ascontiguousarray(pixels_SS3[:, ::-1])
        if angle:
            image = Image.fromarray(pixels_SS3)
            pixels_SS3 = np.array(image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_corner_color(image)))
        return pixels_SS3


def resize_box(image: Image.Image, box: tuple[float, float, float, float], side: int, resample: str) -> np.ndarray:
    """(S, S, 3) uint8: the part of an RGB image within ``box`` (left, top, right, bottom), resized.

    A large box is rounded to whole pixels and resized by torch, which is more than twice as fast as PIL and differs
    from it by at most 2 of 255 levels.
    """
    if resample not in ("bilinear", "bicubic") or (box[2] - box[0]) * (box[3] - box[1]) < LARGE or not _fast_resize():
        return np.array(image.resize((side, side), RESAMPLE[resample], box=box, reducing_gap=3.0))
    left, top, right, bottom = map(round, box)
    crop_13hw = torch.from_numpy(np.array(image))[top:bottom, left:right].permute(2, 0, 1)[None]
    out_13SS = F.interpolate(crop_13hw, (side, side), mode=resample, antialias=True)
    return np.ascontiguousarray(out_13SS[0].permute(1, 2, 0).numpy())


@lru_cache
def _fast_resize() -> bool:
    """Whether this torch resizes uint8 images with vector instructions: 2.1 or newer, on a CPU with AVX2."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return version >= (2, 1) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def random_crop(size: tuple[int, int], augment: AugmentConfig, rng: random.Random) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a crop of an image of ``size`` (width, height), in pixels, not rounded.

    The area is uniform within ``scale``, the ratio log-uniform within ``ratio`` (Szegedy et al. 2014, section 6). After
    ten crops that don't fit it is the largest center crop of an allowed ratio.
    """
    full_width, full_height = size
    for _ in range(10):
        area = rng.uniform(*augment.scale) * full_width * full_height
        ratio = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= full_width and height <= full_height:
            left, top = rng.uniform(0, full_width - width), rng.uniform(0, full_height - height)
            return left, top, width, height
    ratio = min(max(full_width / full_height, augment.ratio[0]), augment.ratio[1])
    width, height = min(full_width, full_height * ratio), min(full_height, full_width / ratio)
    return (full_width - width) / 2, (full_height - height) / 2, width, height


def _corner_color(image: Image.Image) -> tuple[int, ...]:
    """Mean of the four corners, which fills what a rotated image leaves empty."""
    corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]  # (4, 3)
    return tuple(int(value) for value in corners.mean(axis=0).round())
