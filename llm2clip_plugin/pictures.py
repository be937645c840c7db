"""A picture file's bytes become RGB, the same in training, evaluation and pages."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image

from llm2clip_plugin.outside import check_image_size

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = 1
# What PIL raises for damaged files: its own errors, and those that its decoders let through.
DAMAGE = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
)
# Palette images with partial transparency are read as they should be; PIL advises RGBA once a
# process.
warnings.filterwarnings(
    "ignore", message="Palette images with Transparency", category=UserWarning
)


class BrokenImage(ValueError):  # noqa: N818
    """Bytes that are not an image, or a damaged one."""


def open_header(data: bytes) -> Image.Image:
    """The image, its pixels not yet decoded. Raises BrokenImage, also for more than MAX_PIXELS or
    MAX_ASPECT."""
    try:
        image = Image.open(io.BytesIO(data))
    except DAMAGE as error:
        raise BrokenImage(
            f"no image, or damaged ({len(data)} bytes, starting with {data[:8]!r})"
        ) from error
    try:
        check_image_size(*image.size)
    except ValueError as error:
        raise BrokenImage(str(error)) from error
    return image


def load(image: Image.Image, factor: int = 1) -> Image.Image:
    """Decode to RGB, a JPEG at 1/``factor`` of its size by its own transform; or BrokenImage."""
    # PIL would make everything above 255 white
    if image.mode in ("I", "F") and not has_16_bits(image):
        raise BrokenImage(
            "the image has 32 bits a pixel, expected 8 or 16; save it with 8"
        )
    try:
        if factor > 1 and image.format in ("JPEG", "MPO"):
            image.draft("RGB", (image.width // factor, image.height // factor))
        image.load()
        if has_16_bits(image):
            return first_8_bits(image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGE as error:
        raise BrokenImage(f"cannot decode the image: {error}") from error


def is_turned(image: Image.Image) -> bool:
    """Whether viewers turn or mirror the image by its EXIF tag, which load() ignores as LLaVA
    does."""
    try:
        return image.getexif().get(ORIENTATION, UPRIGHT) in range(2, 9)
    except DAMAGE:  # of the tags alone
        return False


def has_16_bits(image: Image.Image) -> bool:
    """Whether a gray image has 16 bits a pixel."""
    # before Pillow 11, a PNG of 16 bits had the mode of 32
    return image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")


def first_8_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 bits as viewers show it: PIL's own conversion makes nearly all of it
    white."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def has_transparency(image: Image.Image) -> bool:
    """Whether a pixel is not opaque; RGB then shows what is stored below it, mostly black. Raises
    BrokenImage."""
    if (
        image.mode not in ("RGBA", "LA", "PA", "La", "RGBa")
        and "transparency" not in image.info
    ):
        return False
    try:
        return image.convert("RGBA").getextrema()[3][0] < 255  # type: ignore[index]
    except DAMAGE as error:
        raise BrokenImage(f"cannot decode the image: {error}") from error
