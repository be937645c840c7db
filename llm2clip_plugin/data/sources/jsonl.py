"""JSON Lines: one object per line."""

from pathlib import Path

from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.sources.base import SourceFormat
from llm2clip_plugin.data.sources.rows import Rows, RowSource
from llm2clip_plugin.files import refuse_encoding

PEEK = 1 << 20  # bytes at its start by which another format is recognized


class JsonlSource(RowSource):
    """The lines that aren't blank."""

    rows_version = 1

    def read_rows(self, path: Path) -> Rows:
        start = 0
        with open(path, "rb") as file:
            _refuse_other_formats(path, file.read(PEEK))
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, start, len(line), b""
                start += len(line)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """ValueError for what spreadsheets and `json.dump` write under this name."""
    refuse_encoding(path, start)
    first = start.strip().partition(b"\n")[0].rstrip()
    if first.startswith(b"["):
        raise ValueError(
            f"{path} is a JSON array, expected an object a line; convert it: `jq -c '.[]' {path} > NEW.jsonl`"
        )
    if first.startswith(b"{") and first.endswith(b"},"):
        raise ValueError(
            f"{path}: lines end with a comma, expected an object a line; convert it: "
            f"`sed 's/}},$/}}/' {path} > NEW.jsonl`"
        )


SOURCE = SourceFormat(
    name="jsonl",
    help="a .jsonl file",
    recognizes=lambda path: has_suffix(path, ".jsonl"),
    open=lambda config, broken_shards: JsonlSource(config),
)
