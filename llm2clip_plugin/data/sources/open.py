"""Open captioned images of any format."""

import os

from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig, format_help, formats

__all__ = ["Shard", "Source", "SourceConfig", "detect_format", "open_source"]


def open_source(config: SourceConfig, broken_shards: dict[str, str] | None = None) -> Source:
    """The source of ``config``, indexed, and downloaded if it is at a URL.

    A broken shard is left out and noted in ``broken_shards`` (name -> reason); without it, it raises ValueError. Raises
    FileNotFoundError if there is no data, ValueError if the format cannot be determined.
    """
    name = config.format if config.format != "auto" else detect_format(config.path)
    return formats()[name].open(config, broken_shards)


def detect_format(path: str) -> str:
    """Name of the format that recognizes a path. Raises FileNotFoundError or ValueError if none does."""
    for known in sorted(formats().values(), key=lambda known: known.fallback):
        if known.recognizes(path):
            return known.name
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}")
    raise ValueError(
        f"cannot determine the format of {path}; choose one with --format ({format_help()}), or "
        f"make it one: `llm2clip data make {path} --output DIR`"
    )
