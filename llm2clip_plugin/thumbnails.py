"""Pictures in a page: small JPEGs as data URIs, so that the page is one file and fetches nothing."""

import base64
import io

SIDE = 256  # pixels of the longer side
QUALITY = 70


def thumbnail(raw: bytes | None) -> str | None:
    """An image file's bytes as the data URI of a small JPEG; None for bytes that are not a picture."""
    if not raw:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            opened.draft("RGB", (SIDE, SIDE))
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
