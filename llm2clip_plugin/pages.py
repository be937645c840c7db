"""HTML pages from jinja2 templates, with small pictures inside, so that a page is one file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

# HTML pages from jinja2 templates. jinja2 comes with torch; it is imported for a page. Pictures are
# small JPEGs as data URIs, so that the page is one file and fetches nothing.

# pixels of the longer side; of the JPEG
SIDE = 256
QUALITY = 70


def page_style() -> str:
    """The CSS that every page of ours starts with: colors, also for dark screens, widths and
    headings."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def render(template: Path, **values: object) -> str:
    """The text of a template file: every value is escaped (``markupsafe.Markup`` is not), an
    unknown name is an error. The template can include and extend the files in its folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


def thumbnail(raw: bytes | None) -> str | None:
    """An image file's bytes as the data URI of a small JPEG; None if they are no picture."""
    if not raw:
        return None
    from llm2clip_plugin.pictures import BrokenImage, load, open_header

    try:
        image = open_header(raw)
        picture = load(image, max(image.size) // SIDE)
    except BrokenImage:
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
