"""LLaVA's pretraining JSON: a list of conversations, the first answer being the caption."""

import json
from pathlib import Path
from typing import Any

from llm2clip_plugin.data.remote import has_suffix
from llm2clip_plugin.data.sources.base import SourceFormat
from llm2clip_plugin.data.sources.rows import Rows, RowSource, pack_rows


class LlavaSource(RowSource):
    """The items with an image; text-only items are not image-caption pairs."""

    rows_version = 1

    def read_rows(self, path: Path) -> Rows:
        try:
            items = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); if it has one object per line, rename it to .jsonl"
            ) from error
        if not isinstance(items, list):
            raise ValueError(f"{path} contains a {type(items).__name__}, expected LLaVA's list of conversations")
        return pack_rows((n, item) for n, item in enumerate(items) if not isinstance(item, dict) or item.get("image"))

    def values(self, row: dict[str, Any]) -> dict[str, Any]:
        """With the first answer, without ``<image>`` placeholders, as "gpt"."""
        answers = (turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
        return {**row, "gpt": next(answers, "").replace("<image>", "").strip()}


SOURCE = SourceFormat(
    name="llava",
    help="LLaVA's .json file",
    recognizes=lambda path: has_suffix(path, ".json"),
    open=lambda config, broken_shards: LlavaSource(config),
)
