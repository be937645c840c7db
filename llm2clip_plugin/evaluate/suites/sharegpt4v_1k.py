"""ShareGPT4V-1k: the first thousand images of the share-captioner file, one long caption each (Long-CLIP)."""

import json
from pathlib import Path
from typing import Any

from llm2clip_plugin.evaluate.suites import Row, Suite, expected_layout, to_captions

FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
ITEMS = 1000  # Long-CLIP excludes the first thousand from training


def read(folder: Path) -> list[Row]:
    """The JSON's first items; images below ``data/``, or next to the JSON."""
    path = folder / FILE
    images = folder / "data" if (folder / "data").is_dir() else folder
    with expected_layout(path):
        return [
            Row(item["image"], images / item["image"], to_captions([item["conversations"][1]["value"]], "long"))
            for item in first_items(path, ITEMS)
        ]


def first_items(path: Path, count: int, block: int = 1 << 20) -> list[Any]:
    """The first ``count`` items of a JSON array, without reading the rest of a file of gigabytes."""
    decoder, items, text, mark = json.JSONDecoder(), [], "", "["
    with path.open(encoding="utf-8") as file:
        while len(items) < count and (more := file.read(block)):
            text += more
            if not items and text.lstrip()[:1] not in ("", "["):
                break
            while len(items) < count and (rest := text.lstrip().removeprefix(mark).lstrip()) and rest[0] != "]":
                try:
                    item, end = decoder.raw_decode(rest)
                except ValueError:
                    break  # the block ends within an item: read the next one
                items.append(item)
                text, mark = rest[end:], ","
    if not items or not isinstance(items[0], dict):
        raise ValueError(f"{path} is not a JSON array of objects")
    return items


SUITE = Suite(
    name="sharegpt4v-1k",
    title="ShareGPT4V-1k",
    requires={
        FILE: "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
        "sam|data/sam": "SA-1B: the images that the ShareGPT4V page lists, as sam/images/sa_*.jpg",
    },
    read=read,
    images=ITEMS,
    order=3,
    table="Retrieval, English",
    paper={
        "CLIP-L-336": (86.2, 84.0),
        "CLIP-L-336 + LLM2CLIP (15 M)": (98.1, 98.4),
        "EVA02-L-336": (91.5, 89.4),
        "EVA02-L-336 + LLM2CLIP (15 M)": (98.8, 99.2),
        "EVA02-L-224, LLM without CC": (55.1, 46.1),
    },
)
