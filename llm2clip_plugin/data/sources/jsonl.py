"""JSON Lines: one object per line."""

import mmap
from array import array
from pathlib import Path

import numpy as np

from llm2clip_plugin.data.sources.base import SourceFormat
from llm2clip_plugin.data.sources.rows import Rows, RowSource
from llm2clip_plugin.data.sources.urls import has_suffix


class JsonlSource(RowSource):
    """The lines that aren't blank, of a memory-mapped file."""

    rows_version = 1

    def read_rows(self, path: Path) -> Rows:
        spans, start = array("q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    spans.extend((start, start + len(line), number))
                start += len(line)
            rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else b""
        return np.array(spans, dtype=np.int64).reshape(-1, 3), rows


SOURCE = SourceFormat(
    name="jsonl",
    help="a .jsonl file",
    recognizes=lambda path: has_suffix(path, ".jsonl"),
    open=lambda config, broken_shards: JsonlSource(config),
)
