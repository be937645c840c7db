"""HTML pages from jinja2 templates. jinja2 comes with torch and is imported when a page is made."""

from pathlib import Path


def page_style() -> str:
    """The CSS that every page of ours starts with: colors, also for dark screens, widths and headings."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def render(template: Path, **values: object) -> str:
    """The text of a template file: every value is escaped (``markupsafe.Markup`` is not), an unknown name is an error.

    The template can include and extend the files in its folder.
    """
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
