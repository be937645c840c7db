"""How large an image may be, before its pixels are decoded."""

MAX_PIXELS = 89_478_485  # of an image; where PIL begins to warn of decompression bombs, 268 MB as RGB
MAX_ASPECT = 256  # longer to shorter side; with its shorter side at 448 pixels such an image has 154 MB


def check_image_size(width: int, height: int) -> None:
    """Raise ValueError for more than MAX_PIXELS or MAX_ASPECT."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the image has {width} x {height} pixels; the limits are {MAX_PIXELS:,} pixels and sides in a ratio of "
            f"{MAX_ASPECT}; crop or resize it"
        )
