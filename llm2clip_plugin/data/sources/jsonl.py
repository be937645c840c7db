"""JSON Lines: one object per line."""

from pathlib import Path

from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.sources.base import SourceFormat
from llm2clip_plugin.data.sources.rows import Rows, RowSource
from llm2clip_plugin.files import refuse_encoding


class JsonlSource(RowSource):
    """The lines that aren't blank."""

    rows_version = 1

    def read_rows(self, path: Path) -> Rows:
        start = 0
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            refuse_encoding(path, head)
            first = head.strip().partition(b"\n")[0].rstrip()
            if first.startswith(b"[") or (first.startswith(b"{") and first.endswith(b"},")):
                raise ValueError(
                    f"{path} is a list, expected an object a line: `jq -c '.[]' {path} > NEW.jsonl`, or, without "
                    f"brackets, `sed 's/}},$/}}/' {path} > NEW.jsonl`"
                )
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, start, len(line), b""
                start += len(line)


SOURCE = SourceFormat(
    name="jsonl",
    help="a .jsonl file",
    recognizes=lambda path: has_suffix(path, ".jsonl"),
    open=lambda config, broken_shards: JsonlSource(config),
)
