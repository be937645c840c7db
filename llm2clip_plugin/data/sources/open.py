"""Open a source of captioned images, whatever its format."""

from __future__ import annotations

import os

from llm2clip_plugin.data.sources.base import Shard, Source, SourceConfig
from llm2clip_plugin.data.sources.tables import TableSource
from llm2clip_plugin.data.sources.tars import TarSource

__all__ = ["Shard", "Source", "SourceConfig", "detect_format", "open_source"]


def open_source(config: SourceConfig, broken_shards: dict[str, str] | None = None) -> Source:
    """The source that ``config`` names, indexed (and downloaded, where it lies at a URL).

    Raises FileNotFoundError if nothing is there, ValueError for a format that can't be told or a broken shard; with
    ``broken_shards`` these are noted there (name -> reason) and left out.
    """
    kind = config.format if config.format != "auto" else detect_format(config.path)
    return TarSource(config, broken_shards) if kind == "webdataset" else TableSource(config, kind)


def detect_format(path: str) -> str:
    """webdataset, jsonl or llava, by the end of the name; a folder is one of tars."""
    plain = path.split("?", 1)[0]
    for ending, kind in ((".jsonl", "jsonl"), (".json", "llava"), (".tar", "webdataset")):
        if plain.endswith(ending):
            return kind
    if os.path.isdir(path) or path.endswith("/") or "://" in path or "*" in path or "{" in path:
        return "webdataset"
    if not os.path.exists(path):
        raise FileNotFoundError(f"no data at {path}")
    raise ValueError(
        f"can't tell the format of {path}: expected a folder of .tar shards, a .tar, a .jsonl, or LLaVA's .json; "
        "say it with --format webdataset, jsonl or llava"
    )
