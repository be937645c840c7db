"""From an image file's bytes to a tower's pixels: decode, augment for training, or prepare for evaluation.

Shapes: S side of the tower's image in pixels, B batch. Pixels are RGB.
"""

from __future__ import annotations

import io
import math
import random
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's own numbers
FITS = ("shortest", "squash")
LARGE = 1 << 16  # pixels of a crop from which half a pixel of rounding is too little to matter (256 x 256)


class BrokenImage(ValueError):  # noqa: N818
    """Bytes that are no image, or not a whole one."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a tower expects of an image; read from its preprocessor_config.json."""

    size: int = 224  # pixels, side of the square that the tower sees
    resize: int = 0  # pixels, shortest edge before the centre crop; 0: size
    fit: str = "shortest"  # shortest: keep the aspect ratio and crop the centre; squash: stretch to the square
    resample: str = "bicubic"  # nearest | lanczos | bilinear | bicubic | box | hamming
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # RGB, of values 0 .. 1; CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # RGB, of values 0 .. 1; CLIP's

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize and self.resize < self.size):
            raise ValueError(
                f"image size {self.size} must be at least 1 and at most resize {self.resize} (or resize 0)"
            )
        if self.fit not in FITS:
            raise ValueError(f"unknown fit {self.fit!r}; known: {', '.join(FITS)}")
        if self.resample not in RESAMPLE:
            raise ValueError(f"unknown resample {self.resample!r}; known: {', '.join(RESAMPLE)}")

    @property
    def shortest_edge(self) -> int:
        """Pixels of the shorter side before the centre crop."""
        return self.resize or self.size

    def with_size(self, size: int) -> ImageConfig:
        """The same preparation for another size of tower, the share that the crop cuts off kept."""
        resize = round(self.resize * size / self.size) if self.resize else 0
        return ImageConfig(size=size, resize=resize, fit=self.fit, resample=self.resample, mean=self.mean, std=self.std)

    @classmethod
    def from_preprocessor(cls, values: dict[str, Any]) -> ImageConfig:
        """Read a Hugging Face image processor's dictionary (CLIP, SigLIP, DINOv2's BitImageProcessor ...).

        Raises ValueError if it asks for something that this class does not do.
        """
        crop = bool(values.get("do_center_crop", "crop_size" in values and values["crop_size"] is not None))
        edge, height, width = _sides(values.get("size"), "size")
        if values.get("do_resize", True) is False or values.get("do_pad"):
            raise ValueError("a preprocessor with do_resize false or do_pad true has no fixed size; not supported")
        if not math.isclose(float(values.get("rescale_factor", 1 / 255)), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"preprocessor has rescale_factor {values['rescale_factor']}; expected 1/255")
        if height != width:
            raise ValueError(f"preprocessor has size {height} x {width}; expected a square")
        normalise = values.get("do_normalize", True)
        common = {
            "resample": _resample_name(values.get("resample", 3)),
            "mean": _triple(values.get("image_mean", cls.mean)) if normalise else (0.0, 0.0, 0.0),
            "std": _triple(values.get("image_std", cls.std)) if normalise else (1.0, 1.0, 1.0),
        }
        if edge and not crop:
            raise ValueError(f"preprocessor keeps the aspect ratio (shortest_edge {edge}) but has no centre crop")
        if not crop:
            return cls(size=height, fit="squash", **common)
        _, crop_height, crop_width = _sides(values.get("crop_size"), "crop_size")
        if crop_height != crop_width:
            raise ValueError(f"preprocessor has crop_size {crop_height} x {crop_width}; expected a square")
        if not edge and height != crop_height:
            raise ValueError(f"preprocessor stretches to {height} and crops {crop_height}; not supported")
        if not edge:
            return cls(size=crop_height, fit="squash", **common)
        return cls(size=crop_height, resize=0 if edge == crop_height else edge, **common)


def _sides(value: Any, name: str) -> tuple[int, int, int]:
    """(shortest edge or 0, height, width) of a preprocessor's size, which may be a number or a mapping."""
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


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training image is varied."""

    scale: tuple[float, float] = (0.9, 1.0)  # share of the image's area that a random crop keeps, smallest and largest
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, narrowest and widest
    flip: bool = False  # mirror every second image; text in images is mirrored too
    rotate: float = 0.0  # degrees; an angle is drawn evenly from -rotate .. rotate
    decode_margin: float = (
        1.0  # a JPEG is decoded at no less than this many times the pixels a side that the crop needs
    )

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop scale {self.scale} must be two numbers within 0 .. 1, the smaller first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop ratio {self.ratio} must be two numbers above 0, the smaller first")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate {self.rotate} must be degrees within 0 .. 180")


# What PIL raises over damaged files: its own, and what slips out of its decoders.
DAMAGE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
)


def decode(data: bytes, min_side: int = 0) -> Image.Image:
    """The image as RGB; a JPEG at 1/2, 1/4 or 1/8 if both sides stay at least ``min_side`` pixels (0: full size).

    Orientation marks (EXIF) are not followed, as in the towers' own preprocessors. Raises BrokenImage.
    """
    image = open_header(data)
    return load(image, shrink_factor(image.size, (min_side, min_side)) if min_side else 1)


def open_header(data: bytes) -> Image.Image:
    """The image with its pixels still undecoded. Raises BrokenImage."""
    if not data:
        raise BrokenImage("the image has no bytes")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BrokenImage(f"not an image that PIL knows ({len(data)} bytes, starting {data[:8]!r})") from error
    except DAMAGE as error:
        raise BrokenImage(f"the image's header can't be read: {error}") from error


def shrink_factor(size: tuple[float, float], needed: tuple[float, float]) -> int:
    """The largest of 1, 2, 4, 8 by which ``size`` (width, height) can be divided and still hold ``needed``."""
    room = min(size[0] / needed[0], size[1] / needed[1])
    return next((factor for factor in (8, 4, 2) if room >= factor), 1)


def load(image: Image.Image, factor: int = 1) -> Image.Image:
    """Decode to RGB, a JPEG at 1/``factor`` in its own transform. Raises BrokenImage."""
    try:
        if factor > 1 and image.format in ("JPEG", "MPO"):
            image.draft("RGB", (image.width // factor, image.height // factor))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGE as error:
        raise BrokenImage(f"the image can't be decoded: {error}") from error


class Normalise:
    """uint8 pixels to the tower's scale: (value / 255 - mean) / std."""

    def __init__(self, config: ImageConfig) -> None:
        std = torch.tensor(config.std).view(1, 3, 1, 1)
        self.shift = torch.tensor(config.mean).view(1, 3, 1, 1) * 255
        self.scale = 1 / (255 * std)

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) float32."""
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return values.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.shift).mul_(self.scale)


class TrainTransform:
    """A random crop, resized; mirrored and turned if the configuration says so. The same rng, the same pixels."""

    def __init__(self, config: ImageConfig, augment: AugmentConfig | None = None) -> None:
        self.config = config
        self.augment = augment or AugmentConfig()
        self.normalise = Normalise(config)

    def __call__(self, data: bytes, rng: random.Random) -> torch.Tensor:
        """(3, S, S) float32. Raises BrokenImage."""
        return self.normalise(self.pixels(data, rng)[None])[0]

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
            pixels_SS3 = np.array(image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_corner_colour(image)))
        return pixels_SS3


def resize_box(image: Image.Image, box: tuple[float, float, float, float], side: int, resample: str) -> np.ndarray:
    """(S, S, 3) uint8: the part of an RGB image within ``box`` (left, top, right, bottom), resized.

    A large box is rounded to whole pixels and resized by torch, whose kernels are more than twice as fast as PIL's and
    differ from them by at most two of 255 levels.
    """
    if resample not in ("bilinear", "bicubic") or (box[2] - box[0]) * (box[3] - box[1]) < LARGE or not _fast_resize():
        return np.array(image.resize((side, side), RESAMPLE[resample], box=box, reducing_gap=3.0))
    left, top, right, bottom = map(round, box)
    crop_13hw = torch.from_numpy(np.array(image))[top:bottom, left:right].permute(2, 0, 1)[None]
    out_13SS = F.interpolate(crop_13hw, (side, side), mode=resample, antialias=True)
    return np.ascontiguousarray(out_13SS[0].permute(1, 2, 0).numpy())


@lru_cache
def _fast_resize() -> bool:
    """Whether this torch resizes bytes by vector instructions: 2.1 or newer, on a CPU with AVX2."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return version >= (2, 1) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def random_crop(size: tuple[int, int], augment: AugmentConfig, rng: random.Random) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a crop of an image of ``size`` (width, height), in pixels, not rounded.

    The area is an even share within ``scale``, the ratio log-even within ``ratio`` (Szegedy et al. 2014, section 6);
    after ten crops that don't fit, the largest centred one whose ratio is allowed.
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


def _corner_colour(image: Image.Image) -> tuple[int, ...]:
    """Mean of the four corners: what a turned image shows beyond its own border."""
    corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]  # (4, 3)
    return tuple(int(value) for value in corners.mean(axis=0).round())


class EvalTransform:
    """The tower's own preparation: resize, crop the centre, normalise; the same values as the HF processor's."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        self.normalise = Normalise(config)

    def __call__(self, data: bytes) -> torch.Tensor:
        """(3, S, S) float32. Raises BrokenImage."""
        return self.normalise(self.pixels(data)[None])[0]

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
