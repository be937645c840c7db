"""Decode image files with PIL, JPEGs at a fraction of their size where that is enough."""

import io
import struct
import warnings

from PIL import Image, UnidentifiedImageError

from llm2clip_plugin.outside.images import check_image_size

# Palette images with partial transparency are read as they should be; PIL advises RGBA once a process.
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)


class BrokenImage(ValueError):  # noqa: N818
    """Bytes that are not an image, or a damaged one."""


# What PIL raises for damaged files: its own errors, and those that its decoders let through.
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

    EXIF orientation is ignored, as in the towers' own preprocessors. Raises BrokenImage.
    """
    image = open_header(data)
    return load(image, shrink_factor(image.size, (min_side, min_side)) if min_side else 1)


def open_header(data: bytes) -> Image.Image:
    """The image, its pixels not yet decoded. Raises BrokenImage, also for more than MAX_PIXELS or MAX_ASPECT."""
    if not data:
        raise BrokenImage("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BrokenImage(f"unknown image format ({len(data)} bytes, starting with {data[:8]!r})") from error
    except DAMAGE as error:
        raise BrokenImage(f"cannot read the image header: {error}") from error
    try:
        check_image_size(*image.size)
    except ValueError as error:
        raise BrokenImage(str(error)) from error
    return image


def shrink_factor(size: tuple[float, float], needed: tuple[float, float]) -> int:
    """The largest of 1, 2, 4, 8 that divides ``size`` (width, height) into no less than ``needed``."""
    ratio = min(size[0] / needed[0], size[1] / needed[1])
    return next((factor for factor in (8, 4, 2) if ratio >= factor), 1)


def has_transparency(image: Image.Image) -> bool:
    """Whether a pixel is not opaque; RGB then shows what is stored below it, mostly black. Raises BrokenImage."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return False
    try:
        return image.convert("RGBA").getextrema()[3][0] < 255  # type: ignore[index]
    except DAMAGE as error:
        raise BrokenImage(f"cannot decode the image: {error}") from error


def load(image: Image.Image, factor: int = 1) -> Image.Image:
    """Decode to RGB, a JPEG at 1/``factor`` of its size by its own transform. Raises BrokenImage."""
    try:
        if factor > 1 and image.format in ("JPEG", "MPO"):
            image.draft("RGB", (image.width // factor, image.height // factor))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGE as error:
        raise BrokenImage(f"cannot decode the image: {error}") from error
